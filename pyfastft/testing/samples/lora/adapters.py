"""Samples of lora_adapters and its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pyfastft._op import REGISTRY, backend
from pyfastft.testing.samples._base import (
    FLOAT32,
    FLOAT64,
    Drawer,
    Precision,
    Reject,
    Sample,
    rejecter,
)


@dataclass(frozen=True)
class _Shape:
    name: str
    m: int
    n: int
    k: int
    lengths: tuple[int, ...]
    r: tuple[int, ...]
    p: tuple[float, ...]
    bias: bool = True
    layout: str = "contiguous"
    large: bool = False


_SHAPES = (
    _Shape("two-odd", 6, 5, 7, (4, 2), (4, 2), (0.3, 0.1)),
    _Shape("base-rows", 9, 8, 16, (3, 0, 4), (2, 4, 1), (0.1, 0.1, 0.0), bias=False),
    _Shape("one", 3, 12, 9, (3,), (2,), (0.0,)),
    _Shape("slice", 7, 6, 11, (1, 6), (3, 3), (0.2, 0.5), layout="slice"),
    _Shape("no-rows", 0, 5, 7, (0, 0), (2, 2), (0.1, 0.1)),
    _Shape("only-base", 4, 5, 7, (0,), (2,), (0.1,)),
    _Shape("tiles", 150, 200, 264, (70, 3, 60), (16, 8, 33), (0.1, 0.0, 0.2), large=True),
)


def _arguments(shape: _Shape, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    draw = Drawer(shape.name, precision, device)
    m, n, k = shape.m, shape.n, shape.k
    x = draw.base(m, 2 * k + 3)[:, 3::2] if shape.layout == "slice" else draw.base(m, k)
    weight = draw.base(n, k, scale=k**-0.5)
    lora_a = [draw.adapter(r, k, scale=k**-0.5) for r in shape.r]
    lora_b = [draw.adapter(n, r, scale=r**-0.5) for r in shape.r]
    bias = draw.base(n) if shape.bias else None
    scaling = [draw.number(0.75 + j) for j in range(len(shape.r))]
    rng = torch.tensor([0x1234567890ABCDE, 1 << 33], device=device) if any(shape.p) else None
    p, lengths = list(shape.p), list(shape.lengths)
    return x, weight, lora_a, lora_b, bias, scaling, p, lengths, rng, None, None


def _gradient_arguments(
    shape: _Shape, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    forward = _arguments(shape, precision, device)
    x, weight, lora_a, lora_b, bias, scaling, p, lengths, rng, *packings = forward
    with backend("reference"):
        xas = REGISTRY["lora_adapters"](*forward)[1]
    grad = Drawer(f"grad {shape.name}", FLOAT64, device).base(shape.m, shape.n)
    # Leaning towards the low-rank output, so that ds does not cancel.
    begin = 0
    for xa, b in zip(xas, lora_b, strict=True):
        grad[begin : begin + len(xa)] += xa.double() @ b.double().T
        begin += len(xa)
    flags = [need[0], need[1], need[4] and bias is not None]
    flags += [need[2], need[3], need[5]] * len(lora_a)
    if not (need[1] or need[2]):
        x = None
    if not (need[3] or need[5]):
        xas = []
    operands = (grad.to(precision.base), x, weight, lora_a, lora_b, xas, scaling, p, lengths, rng)
    return *operands, *packings, flags


_ALL = (True,) * 6
_NEEDS = {
    "input": (True, False, False, False, False, False),
    "adapters": (False, False, True, True, False, False),
    "lora": (True, False, True, True, False, False),
}


def _samples() -> Iterator[Sample]:
    for shape in _SHAPES:
        yield Sample("lora_adapters", shape.name, partial(_arguments, shape), shape.large)


def _backward_samples() -> Iterator[Sample]:
    cases = [(shape, _ALL, shape.name) for shape in _SHAPES]
    cases += [(_SHAPES[1], need, f"{_SHAPES[1].name}-{name}") for name, need in _NEEDS.items()]
    for shape, need, name in cases:
        build = partial(_gradient_arguments, shape, need)
        yield Sample("lora_adapters_backward", name, build, shape.large)


def _shared_rejects(op: str, args: tuple[Any, ...]) -> Iterator[Reject]:
    reject = rejecter(op, args)
    at = REGISTRY[op].parameters.index
    weight, a, b = (args[at(name)] for name in ("weight", "lora_a", "lora_b"))
    yield reject("weight-dtype", "weight", weight.half(), TypeError, "dtype float32", "float16")
    yield reject("a-none", "lora_a", [], ValueError, "at least one adapter", "0")
    yield reject("b-count", "lora_b", b[:1], ValueError, "length 2", "1")
    yield reject(
        "a-columns", "lora_a", [a[0], a[1][:, :6]], ValueError, "(R, 7)", "(2, 6)", at="lora_a[1]"
    )
    yield reject("lengths-count", "lengths", [6], ValueError, "length 2", "1")
    yield reject("lengths-many", "lengths", [4, 3], ValueError, "at most 6 rows", "7")
    yield reject("lengths-negative", "lengths", [7, -1], ValueError, "rows of each", "[7, -1]")
    yield reject("p-above", "p", [0.1, 1.5], ValueError, "a probability", "1.5")
    yield reject("rng-absent", "rng", None, TypeError, "type Tensor", "None")
    yield reject("packed-dtype", "packed", weight[0], TypeError, "dtype uint8", "float32")


def _rejects() -> Iterator[Reject]:
    op = "lora_adapters"
    args = _arguments(_SHAPES[0], FLOAT32, torch.device("cpu"))
    x, bias = args[0], args[4]
    yield from _shared_rejects(op, args)
    reject = rejecter(op, args)
    yield reject("x-columns", "x", x[:, :6], ValueError, "shape (M, 7)", "(6, 6)")
    yield reject("x-3d", "x", x[None], ValueError, "shape (M, K)", "(1, 6, 7)")
    yield reject("bias-shape", "bias", bias[:4], ValueError, "shape (5,)", "(4,)")


def _backward_rejects() -> Iterator[Reject]:
    op = "lora_adapters_backward"
    args = _gradient_arguments(_SHAPES[0], _ALL, FLOAT32, torch.device("cpu"))
    grad, x, xas = args[0], args[1], args[5]
    yield from _shared_rejects(op, args)
    reject = rejecter(op, args)
    yield reject("grad-columns", "grad", grad[:, :4], ValueError, "shape (6, 5)", "(6, 4)")
    yield reject("x-absent", "x", None, TypeError, "type Tensor", "None")
    yield reject("x-rows", "x", x[:1], ValueError, "shape (6, 7)", "(1, 7)")
    yield reject("xas-count", "xas", xas[:1], ValueError, "length 2", "1")
    yield reject("need-short", "need", [True], ValueError, "9 flags", "1")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "lora_adapters": _samples,
    "lora_adapters_backward": _backward_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "lora_adapters": _rejects,
    "lora_adapters_backward": _backward_rejects,
}
