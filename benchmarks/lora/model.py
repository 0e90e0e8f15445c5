"""A whole training step of a real model with an adapter on every linear layer."""

from __future__ import annotations

import copy
from typing import Any

import torch

import pyfastft as ft
from pyfastft.benchmarks.measure import DTYPES, OURS, Case, medians
from pyfastft.benchmarks.methods import minilm

_SENTENCES, _TOKENS = 32, 64
_RANK = 16


def training_step(case: Case, device: torch.device) -> dict[str, float]:
    """MiniLM's real weights: forward, loss, backward and AdamW, over the same model with PEFT's.

    The case gives rank, dropout and dtype; its shape is that of the largest layer.

    Raises:
        ImportError: the weights, transformers or PEFT are not at hand.
    """
    import peft
    import transformers

    dtype = DTYPES[case.dtype]
    base = transformers.AutoModel.from_pretrained(minilm(), local_files_only=True, dtype=dtype)
    base.to(device).train()
    models: dict[str, Any] = {name: copy.deepcopy(base) for name in (OURS, "packed", "peft")}
    for name in (OURS, "packed"):
        targets = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
        config = ft.LoRA(
            r=case.rank, alpha=2 * case.rank, dropout=case.p, targets=targets, adapter_dtype="base"
        )
        ft.convert(models[name], config)
    ft.pack(models["packed"], dx=True)
    models["peft"] = peft.get_peft_model(
        models["peft"],
        peft.LoraConfig(
            r=case.rank,
            lora_alpha=2 * case.rank,
            lora_dropout=case.p,
            target_modules="all-linear",
        ),
        autocast_adapter_dtype=False,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (_SENTENCES, _TOKENS), generator=generator).to(device)

    def step(name: str) -> Any:
        model = models[name]
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def run() -> None:
            loss = model(input_ids=ids).last_hidden_state.float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    counts = {
        name: sum(p.numel() for p in m.parameters() if p.requires_grad)
        for name, m in models.items()
    }
    if len(set(counts.values())) != 1:
        raise AssertionError(f"the models do not train the same: {counts}")
    times = medians({name: step(name) for name in models}, dtype, device, budget_s=30.0)
    return {
        "peft": times["peft"] / times[OURS],
        "peft over packed": times["peft"] / times["packed"],
        "ms": 1e3 * times[OURS],
    }
