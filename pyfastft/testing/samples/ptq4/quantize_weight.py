"""Samples of rtn_quantize and hqq_quantize.

Codes must come out the same in float32 and in float64, so no weight may be near the middle of two:
those of round-to-nearest are multiples of a quarter of a power of two, the extremes such that the
scale is that power; those of HQQ are drawn, and few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import FLOAT32, Drawer, Precision, Reject, Sample, rejecter

_F32, _B16, _F16 = torch.float32, torch.bfloat16, torch.float16
# N, K, group size, codebook, symmetric, grid, scale's dtype, layout, large
_ROUNDED: dict[str, tuple[Any, ...]] = {
    "one-row": (1, 32, 16, "int4", False, 1, _F32, "contiguous", False),
    "ragged": (5, 39, 16, "int4", False, 8, _F32, "contiguous", False),
    "odd-groups": (19, 23, 5, "int4", False, 3, _B16, "contiguous", False),
    "symmetric": (7, 64, 32, "int4", True, 8, _F16, "contiguous", False),
    "per-channel": (17, 21, 64, "int4", True, 1, _F32, "slice", False),
    "nf4": (6, 70, 32, "nf4", False, 4, _F32, "transposed", False),
    "fp4": (9, 33, 64, "fp4", False, 1, _B16, "contiguous", False),
    "no-rows": (0, 8, 4, "int4", False, 2, _F32, "contiguous", False),
    "no-columns": (3, 0, 4, "nf4", False, 2, _F32, "contiguous", False),
    "tiles": (70, 1100, 64, "int4", False, 4, _F32, "contiguous", True),
}
# N, K, group size, round the zero-point, iterations, scale's dtype, layout, large
_HALF: dict[str, tuple[Any, ...]] = {
    "one-row": (1, 32, 16, False, 5, _F32, "contiguous", False),
    "ragged": (5, 39, 16, False, 20, _F32, "contiguous", False),
    "odd-groups": (19, 23, 5, True, 10, _B16, "contiguous", False),
    "bfloat16": (3, 40, 16, False, 4, _B16, "contiguous", False),
    "rounded": (7, 64, 32, True, 20, _F16, "slice", False),
    "per-channel": (17, 21, 64, False, 3, _F32, "transposed", False),
    "no-steps": (2, 8, 8, False, 0, _F32, "contiguous", False),
    "no-rows": (0, 8, 4, False, 2, _F32, "contiguous", False),
    "no-columns": (3, 0, 4, True, 2, _F32, "contiguous", False),
}


def _laid_out(weight: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return weight.T.contiguous().T
    if layout == "slice":
        wide = torch.zeros(weight.shape[0], weight.shape[1] + 3, dtype=weight.dtype)
        wide = wide.to(weight.device)
        wide[:, 2:-1] = weight
        return wide[:, 2:-1]
    return weight


def _rounded_arguments(name: str, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    n, k, g, codebook, symmetric, grid, scale_dtype, layout, _ = _ROUNDED[name]
    draw = Drawer(name, precision, device)
    if codebook != "int4":
        weight = draw.base(n, k).mul(24).round().clamp(-60, 60) / 64
        weight[:, ::g] = 1.0
    elif symmetric:
        weight = draw.base(n, k).mul(12).round().clamp(-29, 29) / 32
        weight[:, ::g] = -7.5 / 8
    else:
        weight = draw.base(n, k).mul(12).round().clamp(-20, 36) / 32
        weight[:, ::g] = -0.625
        weight[:, 1::g] = 1.25
        # A last group of one column has no second extreme.
    return _laid_out(weight, layout), g, codebook, symmetric, grid, scale_dtype


def _half_arguments(name: str, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    n, k, g, round_zero, iterations, scale_dtype, layout, _ = _HALF[name]
    weight = Drawer(f"hqq {name}", precision, device).base(n, k)
    options = (round_zero, iterations, 0.7, 10.0, 1.01, scale_dtype)
    return _laid_out(weight, layout), g, *options


def _rounded_samples() -> Iterator[Sample]:
    for name, (*_, large) in _ROUNDED.items():
        yield Sample("rtn_quantize", name, partial(_rounded_arguments, name), large)


def _half_samples() -> Iterator[Sample]:
    for name, (*_, large) in _HALF.items():
        yield Sample("hqq_quantize", name, partial(_half_arguments, name), large)


def _shared_rejects(op: str, args: tuple[Any, ...]) -> Iterator[Reject]:
    reject = rejecter(op, args)
    yield reject("weight-1d", "weight", torch.ones(4), ValueError, "shape (N, K)", "(4,)")
    weight = torch.ones(2, 4, dtype=torch.int8)
    yield reject("weight-int8", "weight", weight, TypeError, "dtype float32", "int8")
    yield reject("group-0", "group_size", 0, ValueError, "at least 1", "0")
    yield reject("scale-int8", "scale_dtype", torch.int8, TypeError, "float32 or", "int8")


def _rounded_rejects() -> Iterator[Reject]:
    op, args = "rtn_quantize", _rounded_arguments("ragged", FLOAT32, torch.device("cpu"))
    yield from _shared_rejects(op, args)
    reject = rejecter(op, args)
    yield reject("codebook", "codebook", "int3", ValueError, "'int4' or 'nf4'", "'int3'")
    yield reject("grid-0", "grid", 0, ValueError, "one candidate or more", "0")


def _half_rejects() -> Iterator[Reject]:
    op, args = "hqq_quantize", _half_arguments("ragged", FLOAT32, torch.device("cpu"))
    yield from _shared_rejects(op, args)
    reject = rejecter(op, args)
    yield reject("iterations", "iterations", -1, ValueError, "0 or more", "-1")
    yield reject("power-0", "power", 0.0, ValueError, "a positive number", "0.0")
    yield reject("power-3", "power", 3.0, ValueError, "at most 2", "3.0")
    yield reject("beta-inf", "beta", float("inf"), ValueError, "a positive number", "inf")
    yield reject("kappa-nan", "kappa", float("nan"), ValueError, "a positive number", "nan")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "rtn_quantize": _rounded_samples,
    "hqq_quantize": _half_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "rtn_quantize": _rounded_rejects,
    "hqq_quantize": _half_rejects,
}
