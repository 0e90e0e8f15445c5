"""4-bit linear layers beside ATen's int4 product, bitsandbytes and dense bfloat16, by figures.

Forwards rotate over weights that no cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import pyfastft as ft
from pyfastft.benchmarks.measure import OURS
from pyfastft.benchmarks.ptq4.layer import (
    GROUP,
    NF4_GROUP,
    Weight,
    bnb_dequantize,
    bnb_layer,
    ratios,
    rotated,
    times,
    why_no_bitsandbytes,
)

_ROWS = (1, 4, 16, 64, 256, 1024)
_GRADIENT_ROWS = (64, 512, 2048)


@torch.no_grad()
def forward(*_: Any) -> dict[str, float | str]:
    """W4A16, symmetric, groups of 128, 4096 x 4096, bfloat16 x: times over each peer by M, and how
    fast nf4 in groups of 64 is beside it."""
    weights = rotated(4096, 4096)
    aten = [weight.aten() for weight in weights]
    why = why_no_bitsandbytes()
    bitsandbytes = [] if why else [weight.bnb_linear() for weight in weights]
    found: dict[str, float | str] = {}
    for m in _ROWS:
        x = torch.randn(m, weights[0].dense.shape[1]).bfloat16()
        steps = {
            OURS: [partial(w.ours, x) for w in weights],
            "aten int4": [partial(f, x) for f in aten],
            "bitsandbytes nf4": [partial(f, x) for f in bitsandbytes],
            "bf16": [partial(torch.nn.functional.linear, x, w.dense) for w in weights],
            "ours nf4": [partial(w.ours_nf4, x) for w in weights],
        }
        if why:
            del steps["bitsandbytes nf4"]
            found[f"M={m} over bitsandbytes nf4"] = why
        median, _ = times(steps)
        nf4 = median.pop("ours nf4")
        found |= ratios(median, f"M={m}")
        found[f"M={m} nf4 beside int4"] = median[OURS] / nf4
    return found


@torch.no_grad()
def forward_wide(*_: Any) -> dict[str, float | str]:
    """The same of one row at 4096 x 14336, and its share of the bandwidth of reading."""
    n, k = 14336, 4096
    weights = rotated(n, k)
    x = torch.randn(1, k).bfloat16()
    median, bandwidth = times(
        {
            OURS: [partial(w.ours, x) for w in weights],
            "aten int4": [partial(w.aten(), x) for w in weights],
        }
    )
    size = n * k / 2 + n * (k // GROUP) * 4
    return {
        **ratios(median, "M=1"),
        "percent of bandwidth": 100 * size / median[OURS] / bandwidth,
    }


def input_gradient(*_: Any) -> dict[str, float | str]:
    """dX of nf4 in groups of 64, 4096 x 4096, over bitsandbytes' dequantize-and-multiply."""
    if why := why_no_bitsandbytes():
        return {f"M={m} over bitsandbytes": why for m in _GRADIENT_ROWS}
    weight = Weight.draw(4096, 4096)
    dense = bnb_dequantize(weight)

    def theirs(grad: torch.Tensor) -> torch.Tensor:
        return grad @ dense()

    found: dict[str, float | str] = {}
    for m in _GRADIENT_ROWS:
        grad = torch.randn(m, 4096).bfloat16()
        steps = {
            OURS: [partial(weight.input_gradient, grad)],
            "bitsandbytes": [partial(theirs, grad)],
        }
        found |= ratios(times(steps, budget_s=10.0)[0], f"M={m}")
    return found


def error(*_: Any) -> dict[str, float]:
    """Root mean square error against float64 of the dequantized product, over that of a dense
    bfloat16 product of the dequantized weights."""
    weight = Weight.draw(1024, 4096)
    x = torch.randn(256, 4096).bfloat16()
    nf4 = ft.functional.int4_dequantize(
        weight.nf4_codes, weight.nf4_scale, group_size=NF4_GROUP, codebook="nf4"
    )
    found = {}
    for name, dense, y in (
        ("int4", weight.dequantized(), weight.ours(x)),
        ("nf4", nf4, weight.ours_nf4(x)),
    ):
        truth = x.double() @ dense.double().T
        theirs = torch.nn.functional.linear(x, dense.bfloat16())
        ours, theirs = (float((a.double() - truth).square().mean().sqrt()) for a in (y, theirs))
        found[name] = ours / theirs
    return found


def qlora(*_: Any) -> dict[str, float | str]:
    """QLoRA forward and backward, nf4 in groups of 64, M = 512, 1024 x 4096, r 16, p .05, over PEFT
    on bitsandbytes with float32 and with bfloat16 adapters."""
    adapters = ((torch.float32, "fp32 adapters"), (torch.bfloat16, "bf16 adapters"))
    if why := why_no_bitsandbytes():
        return {f"M=512 over peft, {name}": why for _, name in adapters}
    import peft
    from peft.tuners.lora.bnb import Linear4bit

    m, k, n, r, p = 512, 1024, 4096, 16, 0.05
    weight = Weight.draw(n, k)
    x = torch.randn(m, k).bfloat16().requires_grad_()
    grad = torch.randn(m, n).bfloat16()
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p)

    def step(forward: Callable[[], torch.Tensor], *adapter: torch.Tensor) -> None:
        torch.autograd.grad(forward(), (x, *adapter), grad)

    def ours(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ft.functional.int4_lora_linear(
            *(x, weight.nf4_codes, weight.nf4_scale, a, b),
            scaling=2.0,
            p=p,
            group_size=NF4_GROUP,
            codebook="nf4",
        )

    found: dict[str, float | str] = {}
    for dtype, name in adapters:
        layer: Any = Linear4bit(bnb_layer(weight), "default", config, r=r, lora_alpha=2 * r)
        layer.train()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for parameter in (a, b):
            parameter.data = torch.randn(parameter.shape).to(dtype) * 0.03
        steps = {
            OURS: [partial(step, partial(ours, a, b), a, b)],
            f"peft, {name}": [partial(step, partial(layer, x), a, b)],
        }
        found |= ratios(times(steps, budget_s=10.0)[0], "M=512")
    return found
