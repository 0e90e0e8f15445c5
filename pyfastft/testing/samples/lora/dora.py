"""Samples of dora_norm and scale_columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import (
    FLOAT32,
    FLOAT64,
    Drawer,
    Precision,
    Reject,
    Sample,
    rejecter,
)

# N, K, R, whether |W|^2 is known, layout of W, large
_NORMS = {
    "odd": (5, 7, 4, False, "contiguous", False),
    "known": (9, 16, 2, True, "contiguous", False),
    "transposed": (17, 12, 3, False, "transposed", False),
    "rank-33": (6, 24, 33, True, "contiguous", False),
    "no-rows": (0, 7, 4, False, "contiguous", False),
    "no-inputs": (5, 0, 4, True, "contiguous", False),
    "tiles": (300, 450, 16, False, "contiguous", True),
}
# shape, whether there is a bias, layout of x, large
_SCALES = {
    "odd": ((2, 3, 5), True, "contiguous", False),
    "no-bias": ((7, 16), False, "contiguous", False),
    "vector": ((9,), True, "contiguous", False),
    "slice": ((6, 11), True, "slice", False),
    "expanded": ((6, 8), False, "expanded", False),
    "no-rows": ((0, 5), True, "contiguous", False),
    "no-columns": ((3, 0), True, "contiguous", False),
    "tiles": ((300, 1000), True, "contiguous", True),
}


def _norm_arguments(name: str, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    n, k, r, known, layout, _ = _NORMS[name]
    draw = Drawer(name, precision, device)
    scale = max(k, 1) ** -0.5
    weight = (
        draw.base(k, n, scale=scale).T if layout == "transposed" else draw.base(n, k, scale=scale)
    )
    lora_a, lora_b = draw.adapter(r, k, scale=scale), draw.adapter(n, r, scale=r**-0.5)
    # As much as the norm's own dtype can know of it.
    squared = weight.to(draw.number(0).dtype).square().sum(1) if known else None
    return weight, lora_a, lora_b, draw.number(0.75), squared


def _scale_arguments(name: str, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    shape, has_bias, layout, _ = _SCALES[name]
    draw = Drawer(name, precision, device)
    n = shape[-1]
    if layout == "slice":
        x = draw.base(*shape[:-1], 2 * n + 1)[..., 1::2]
    elif layout == "expanded":
        x = draw.base(n).expand(shape)
    else:
        x = draw.base(*shape)
    return x, 1 + draw.wide(n, scale=0.25), draw.base(n) if has_bias else None


def _scale_gradient_arguments(
    name: str, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    x, scale, _ = _scale_arguments(name, precision, device)
    # Of x's signs, so that dg does not cancel.
    noise = Drawer(f"grad {name}", FLOAT64, device).base(*x.shape)
    grad = (noise.abs() * x.double().sign()).to(precision.base)
    return grad, x if need[1] else None, scale, list(need)


_ALL = (True, True, True)
_NEEDS = {"input": (True, False, False), "scale": (False, True, False)}


def _norm_samples() -> Iterator[Sample]:
    for name, (*_, large) in _NORMS.items():
        yield Sample("dora_norm", name, partial(_norm_arguments, name), large)


def _scale_samples() -> Iterator[Sample]:
    for name, (*_, large) in _SCALES.items():
        yield Sample("scale_columns", name, partial(_scale_arguments, name), large)


def _scale_backward_samples() -> Iterator[Sample]:
    cases = [(name, _ALL, name, large) for name, (*_, large) in _SCALES.items()]
    cases += [("odd", need, f"odd-{name}", False) for name, need in _NEEDS.items()]
    for name, need, label, large in cases:
        build = partial(_scale_gradient_arguments, name, need)
        yield Sample("scale_columns_backward", label, build, large)


def _norm_rejects() -> Iterator[Reject]:
    args = _norm_arguments("known", FLOAT32, torch.device("cpu"))
    weight, a, b, _, squared = args
    reject = rejecter("dora_norm", args)
    yield reject("weight-1d", "weight", weight[0], ValueError, "shape (N, K)", "(16,)")
    yield reject("weight-integer", "weight", weight.int(), TypeError, "dtype float32", "int32")
    yield reject("a-columns", "lora_a", a[:, :6], ValueError, "shape (R, 16)", "(2, 6)")
    yield reject("b-rank", "lora_b", b[:, :1], ValueError, "shape (9, 2)", "(9, 1)")
    yield reject("scaling-two", "scaling", torch.ones(2), ValueError, "one element", "(2,)")
    yield reject("squared-shape", "squared", squared[:3], ValueError, "shape (9,)", "(3,)")
    yield reject("squared-dtype", "squared", squared.half(), TypeError, "dtype float32", "float16")


def _scale_rejects() -> Iterator[Reject]:
    args = _scale_arguments("odd", FLOAT32, torch.device("cpu"))
    x, scale, bias = args
    reject = rejecter("scale_columns", args)
    yield reject("x-scalar", "x", x[0, 0, 0], ValueError, "at least one dimension", "a scalar")
    yield reject("x-integer", "x", x.int(), TypeError, "dtype float32", "int32")
    yield reject("scale-shape", "scale", scale[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("scale-dtype", "scale", scale.half(), TypeError, "dtype float32", "float16")
    yield reject("bias-shape", "bias", bias[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("bias-dtype", "bias", bias.half(), TypeError, "dtype float32", "float16")


def _scale_backward_rejects() -> Iterator[Reject]:
    args = _scale_gradient_arguments("odd", _ALL, FLOAT32, torch.device("cpu"))
    x, scale = args[1:3]
    reject = rejecter("scale_columns_backward", args)
    yield reject("x-absent", "x", None, TypeError, "type Tensor", "None")
    yield reject("x-shape", "x", x[:1], ValueError, "shape (2, 3, 5)", "(1, 3, 5)")
    yield reject("scale-shape", "scale", scale[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("need-short", "need", [True], ValueError, "three flags", "1")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "dora_norm": _norm_samples,
    "scale_columns": _scale_samples,
    "scale_columns_backward": _scale_backward_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "dora_norm": _norm_rejects,
    "scale_columns": _scale_rejects,
    "scale_columns_backward": _scale_backward_rejects,
}
