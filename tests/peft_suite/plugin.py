"""pytest plugin: PEFT's LoRA over nn.Linear computes with pyfastft, and every call is counted.

Loaded into a run of PEFT's own tests by ``-p plugin``. A call is *ours*; or *idle*, where no
adapter computes; or it falls back to PEFT's own forward for a counted reason.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import peft.tuners.lora.layer as peft_lora
import pytest
import torch
from torch import nn

import pyfastft as ft

OURS = "ours"
IDLE = "idle: disabled, merged, or no active adapter"
VARIANT = "another method: "  # DoRA and its like compute another equation.

counts: Counter[str] = Counter()
peft_forward = peft_lora.Linear.forward


def active_adapters(layer: peft_lora.Linear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def what_it_is(layer: peft_lora.Linear, x: torch.Tensor, args: Any, kwargs: Any) -> str:
    """OURS, or why not."""
    names = active_adapters(layer)
    base = layer.base_layer
    if not isinstance(layer.get_base_layer(), nn.Linear):
        return f"over {type(layer.get_base_layer()).__name__}"
    if layer.disable_adapters or layer.merged or not names:
        return IDLE
    for name in names:
        if name in layer.lora_variant:
            return VARIANT + type(layer.lora_variant[name]).__name__
    if args or any(value is not None for value in kwargs.values()):
        return f"arguments: {', '.join(sorted(kwargs)) or len(args)}"
    if type(base) is not nn.Linear:
        return f"the base layer is {type(base).__name__}"
    if base._forward_hooks or base._forward_pre_hooks:
        return "hooks on the base layer"
    for name in names:
        for part in (layer.lora_A[name], layer.lora_B[name]):
            if type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks:
                return f"the adapter's layer is {type(part).__name__}, or has hooks"
        if type(layer.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
            return f"dropout is {type(layer.lora_dropout[name]).__name__}"
        adapter = layer.lora_A[name].weight
        if adapter.dtype != x.dtype and not layer.cast_input_dtype_enabled:
            return "casting is switched off"
        if not torch.is_autocast_enabled(x.device.type):
            wide = torch.promote_types(x.dtype, torch.float32)
            if x.dtype != base.weight.dtype or adapter.dtype not in (x.dtype, wide):
                return f"dtypes {x.dtype}, {base.weight.dtype}, {adapter.dtype}"
    if len(names) > 1 and any(probability(layer, name) for name in names):
        return "several adapters with dropout"
    return OURS


def probability(layer: peft_lora.Linear, name: str) -> float:
    dropout = layer.lora_dropout[name]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def ours(layer: peft_lora.Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer's output by pyfastft; several adapters as one of the sum of their ranks."""
    names = active_adapters(layer)
    base = layer.base_layer
    bias = base.bias
    for name in names:
        if (update := layer.lora_B[name].bias) is not None:
            update = update * layer.scaling[name]
            bias = update if bias is None else bias + update
    a = [layer.lora_A[name].weight for name in names]
    b = [layer.lora_B[name].weight for name in names]
    scaling = layer.scaling[names[0]]
    if len(names) > 1:
        a = [torch.cat(a)]
        b = [torch.cat([w * layer.scaling[n] for w, n in zip(b, names, strict=True)], dim=1)]
        scaling = 1.0
    return ft.lora_linear(
        x,
        base.weight,
        a[0],
        b[0],
        bias=bias if bias is None else bias.to(base.weight.dtype),
        scaling=scaling,
        p=probability(layer, names[0]),
    )


def forward(layer: peft_lora.Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What stands in for ``peft.tuners.lora.layer.Linear.forward``."""
    layer._check_forward_args(x, *args, **kwargs)
    kind = what_it_is(layer, x, args, kwargs)
    counts[kind] += 1
    return ours(layer, x) if kind == OURS else peft_forward(layer, x, *args, **kwargs)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lora-counts", type=Path, help="where to write the counts, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    peft_lora.Linear.forward = forward


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for kind, number in counts.most_common():
        terminalreporter.write_line(f"LoRA forwards, {kind}: {number}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--lora-counts"):
        path.write_text(json.dumps(counts))
