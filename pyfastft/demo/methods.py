"""The fine-tuning methods that the demo compares: a new method is a row of :data:`METHODS`.

The model that a method gets has a ``head``, which every method trains, and ``lora_targets``, the
names of the layers to adapt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import pyfastft as ft

RANK, ALPHA, DROPOUT = 8, 16, 0.1


@dataclass(frozen=True)
class Method:
    """How a model is made ready for one way of fine-tuning it."""

    name: str
    label: str
    engine: str  # what computes it: "pyfastft" or "PyTorch"
    kind: str  # which of the task's learning rates it takes: "full" or "adapter"
    apply: Callable[[Any], None]


class PlainLoRALinear(nn.Module):
    """LoRA as PEFT computes it, in PyTorch's own operators: the baseline."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        factory = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.dropout = nn.Dropout(DROPOUT)
        self.lora_a = nn.Linear(base.in_features, RANK, bias=False, **factory)
        self.lora_b = nn.Linear(RANK, base.out_features, bias=False, **factory)
        self.scaling = ALPHA / RANK
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_b(self.lora_a(self.dropout(x))) * self.scaling


def full(model: Any) -> None:
    """Train every weight."""
    model.requires_grad_(True)


def lora(model: Any) -> None:
    """Train adapters through pyfastft, and the head."""
    ft.convert(model, ft.LoRA(r=RANK, alpha=ALPHA, dropout=DROPOUT, targets=model.lora_targets))
    model.head.requires_grad_(True)


def plain_lora(model: Any) -> None:
    """Train adapters through plain PyTorch, and the head."""
    model.requires_grad_(False)
    targets = model.lora_targets
    for name, module in list(model.named_modules()):
        if name in targets or name.rpartition(".")[2] in targets:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, PlainLoRALinear(module))
    model.head.requires_grad_(True)


METHODS = (
    Method("full", "full fine-tuning", "PyTorch", "full", full),
    Method("lora", "LoRA, pyfastft", "pyfastft", "adapter", lora),
    Method("plain-lora", "LoRA, plain PyTorch", "PyTorch", "adapter", plain_lora),
)
