"""lora_linear over many shapes, and what LoRA adds to a linear layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import pyfastft as ft
from pyfastft.benchmarks.lora.layer import Operands, dropped_expression, gate, peft_layer
from pyfastft.benchmarks.measure import DTYPES, OURS, Case, medians
from pyfastft.native import _gemm

_TOKENS = (1, 16, 512, 2048)
_LAYERS = ((384, 1536), (1024, 1024), (1024, 4096), (4096, 4096))  # K, N
_RANKS = (8, 16, 64)
_DROPOUTS = (0.0, 0.1)
_CELL_S = 1.0
_CELL_ROUNDS = 5
LOWEST = 0.95


def cells(dtype: str) -> list[Case]:
    """Every combination of tokens, layer, rank and dropout."""
    return [
        Case((m, k, n), r, p, dtype)
        for (k, n), r, p, m in itertools.product(_LAYERS, _RANKS, _DROPOUTS, _TOKENS)
    ]


def grid(case: Case, device: torch.device) -> dict[str, float]:
    """Over the better of PEFT's layer and the compiled expression, forward and backward.

    Only the case's dtype counts. ``geometric mean`` and the lowest cell, with the weight packed
    once and as it is; ``cells below`` is how many lie under 0.95.
    """
    ratios: dict[str, list[float]] = {"packed": [], "plain": []}
    # One compilation for all cells, of parameters too.
    with torch._dynamo.config.patch(force_parameter_static_shapes=False, recompile_limit=64):
        for cell in cells(case.dtype):
            for name, ratio in cell_ratios(cell, device).items():
                ratios[name].append(ratio)
    numbers = {}
    for name, values in ratios.items():
        numbers[f"geometric mean, {name}"] = math.exp(sum(map(math.log, values)) / len(values))
        numbers[f"lowest, {name}"] = min(values)
        numbers[f"cells below {LOWEST}, {name}"] = float(sum(v < LOWEST for v in values))
    return numbers


def cell_ratios(case: Case, device: torch.device) -> dict[str, float]:
    """Speed over the better peer of one cell, with the weight packed once and as it is."""
    torch.manual_seed(0)
    drawn = Operands.draw(case, device)
    p = case.p
    layer = peft_layer(drawn, p)
    if case.shape[0] == _TOKENS[1]:  # the reference of more tokens would take minutes
        gate(drawn, p, layer)
    # Static shapes would be compiled for a quarter of an hour; the products are the same calls.
    compiled = torch.compile(dropped_expression, fullgraph=True, dynamic=True)
    operands = (drawn.x, drawn.weight, drawn.lora_a, drawn.lora_b)
    packed = pack(drawn.weight)
    forwards: dict[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: drawn.ours(p),
        "packed": lambda: ft.lora_linear(*operands, scaling=drawn.scaling, p=p, **packed),
        "peft": lambda: layer(drawn.x),
        "torch.compile": lambda: compiled(*operands, p),
    }
    steps = {name: lambda f=forward: drawn.step(f) for name, forward in forwards.items()}
    times = medians(steps, DTYPES[case.dtype], device, budget_s=_CELL_S, min_rounds=_CELL_ROUNDS)
    best = min(times["peft"], times["torch.compile"])
    return {name: best / times[name] for name in ("packed", "plain")}


def pack(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A frozen weight packed for both directions, as keywords of ``lora_linear``."""
    if weight.device.type != "cpu":
        return {}
    return {
        "packed": ft.functional.pack_weight(weight),
        "packed_dx": ft.functional.pack_weight(weight, transposed=True),
    }


def share(case: Case, device: torch.device) -> dict[str, float]:
    """What LoRA adds to a linear layer's forward and backward (dX), in percent of it.

    Over torch's linear layer, over our core's, and over the faster of the two; ours with the weight
    as it is, and with it packed once on both sides. PEFT's over torch's beside them.
    """
    drawn = Operands.draw(case, device)
    layer = peft_layer(drawn, case.p)
    gate(drawn, case.p, layer)
    x, grad, weight = drawn.x, drawn.grad, drawn.weight
    packed = pack(weight)
    operands = (x, weight, drawn.lora_a, drawn.lora_b)

    def torchs() -> Any:
        y = F.linear(x, weight)
        return torch.autograd.grad(y, x, grad)

    plain_x = x.detach()
    y, dx = torch.empty_like(grad), torch.empty_like(plain_x)

    def ours() -> None:
        _gemm.matmul(y, plain_x, weight)
        _gemm.matmul(dx, grad, weight.T)

    def ours_packed() -> None:
        _gemm.matmul(y, plain_x, packed_b=packed["packed"])
        _gemm.matmul(dx, grad, packed_b=packed["packed_dx"])

    times = medians(
        {
            OURS: lambda: drawn.step(lambda: drawn.ours(case.p)),
            "packed": lambda: drawn.step(
                lambda: ft.lora_linear(*operands, scaling=drawn.scaling, p=case.p, **packed)
            ),
            "peft": lambda: drawn.step(lambda: layer(x)),
            "torch's linear": torchs,
            "our linear": ours,
            "our linear, packed": ours_packed,
        },
        DTYPES[case.dtype],
        device,
    )

    def over(name: str, base: str) -> float:
        return 100 * (times[name] / times[base] - 1)

    faster = min(("torch's linear", "our linear"), key=times.__getitem__)
    return {
        "over the faster": over(OURS, faster),
        "over ours": over(OURS, "our linear"),
        "over torch's": over(OURS, "torch's linear"),
        "packed over ours packed": over("packed", "our linear, packed"),
        "packed over torch's": over("packed", "torch's linear"),
        "peft over torch's": over("peft", "torch's linear"),
    }
