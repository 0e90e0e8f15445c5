"""Samples of lora_projections and its backward."""

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
    leading: tuple[int, ...]
    k: int
    n: tuple[int, ...]
    r: tuple[int, ...]
    p: tuple[float, ...]
    bias: tuple[bool, ...]
    layout: str = "contiguous"
    large: bool = False


_SHAPES = (
    _Shape("two-odd", (2, 3), 7, (5, 3), (4, 2), (0.3, 0.3), (True, False)),
    _Shape("qkv", (6,), 16, (16, 8, 8), (4, 4, 4), (0.1,) * 3, (True, False, True)),
    _Shape("one", (3,), 12, (9,), (2,), (0.0,), (True,)),
    _Shape("slice", (7,), 11, (6, 5), (3, 3), (0.2, 0.5), (False, False), layout="slice"),
    _Shape("permuted", (4, 5), 16, (9, 17), (4, 1), (0.0, 0.4), (True, True), layout="permuted"),
    _Shape("no-dropout", (5,), 40, (9, 24), (3, 4), (0.0, 0.0), (True, False)),
    _Shape(
        "five", (6,), 24, (5, 8, 3, 16, 7), (2, 3, 2, 1, 4), (0.0, 0.2) * 2 + (0.1,), (False,) * 5
    ),
    _Shape("no-rows", (0,), 7, (5, 4), (2, 2), (0.1, 0.1), (True, True)),
    _Shape("no-columns", (3,), 7, (0, 4), (2, 2), (0.0, 0.0), (False, True)),
    _Shape(
        "tiles", (70,), 264, (300, 70, 16), (16, 8, 33), (0.1, 0.0, 0.2), (True,) * 3, large=True
    ),
)


def _arguments(shape: _Shape, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    draw = Drawer(shape.name, precision, device)
    k = shape.k
    if shape.layout == "slice":
        x = draw.base(*shape.leading, 2 * k + 3)[..., 3::2]
    elif shape.layout == "permuted":
        x = draw.base(*shape.leading[::-1], k).transpose(0, 1)
    else:
        x = draw.base(*shape.leading, k)
    weights = [draw.base(n, k, scale=k**-0.5) for n in shape.n]
    lora_a = [draw.adapter(r, k, scale=k**-0.5) for r in shape.r]
    lora_b = [draw.adapter(n, r, scale=r**-0.5) for n, r in zip(shape.n, shape.r, strict=True)]
    biases = [draw.base(n if has else 0) for n, has in zip(shape.n, shape.bias, strict=True)]
    scaling = [draw.number(0.75 + j) for j in range(len(shape.n))]
    rng = torch.tensor([0x1234567890ABCDE, 1 << 33], device=device) if any(shape.p) else None
    return x, weights, lora_a, lora_b, biases, scaling, list(shape.p), rng, [], []


def _gradient_arguments(
    shape: _Shape, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    forward = _arguments(shape, precision, device)
    x, weights, lora_a, lora_b, biases, scaling, p, rng, *packings = forward
    with backend("reference"):
        xas = REGISTRY["lora_projections"](*forward)[1]
    draw = Drawer(f"grad {shape.name}", FLOAT64, device)
    # Leaning towards the low-rank output, so that ds does not cancel.
    grads = [
        (draw.base(*x.shape[:-1], n) + xa.double() @ b.double().T).to(precision.base)
        for n, xa, b in zip(shape.n, xas, lora_b, strict=True)
    ]
    if not (need[1] or need[2]):
        x = None
    if not (need[3] or need[5]):
        xas = []
    each = [need[1], need[2], need[3], None, need[5]]
    flags = [need[0]]
    for bias in biases:
        flags += [need[4] and bias.numel() > 0 if flag is None else flag for flag in each]
    return grads, x, weights, lora_a, lora_b, xas, scaling, p, rng, *packings, flags


_ALL = (True,) * 6
_NEEDS = {
    "input": (True, False, False, False, False, False),
    "adapters": (False, False, True, True, False, False),
    "lora": (True, False, True, True, False, False),
}


def _samples() -> Iterator[Sample]:
    for shape in _SHAPES:
        yield Sample("lora_projections", shape.name, partial(_arguments, shape), shape.large)


def _backward_samples() -> Iterator[Sample]:
    cases = [(shape, _ALL, shape.name) for shape in _SHAPES]
    cases += [(_SHAPES[1], need, f"{_SHAPES[1].name}-{name}") for name, need in _NEEDS.items()]
    for shape, need, name in cases:
        build = partial(_gradient_arguments, shape, need)
        yield Sample("lora_projections_backward", name, build, shape.large)


def _shared_rejects(op: str, args: tuple[Any, ...]) -> Iterator[Reject]:
    reject = rejecter(op, args)
    at = REGISTRY[op].parameters.index
    weights, a, b = (args[at(name)] for name in ("weights", "lora_a", "lora_b"))
    w0, w1 = weights
    yield reject("weights-none", "weights", [], ValueError, "at least one weight", "0")
    yield reject(
        "weights-columns", "weights", [w0, w1[:, :6]], ValueError, "to match", "(", at="lora_a[1]"
    )
    yield reject("a-count", "lora_a", a[:1], ValueError, "length 2", "1")
    yield reject("b-count", "lora_b", b[:1], ValueError, "length 2", "1")
    yield reject(
        "b-rank",
        "lora_b",
        [b[0], b[1][:, :1]],
        ValueError,
        "shape (3, 2)",
        "(3, 1)",
        at="lora_b[1]",
    )
    yield reject("p-above", "p", [0.1, 1.5], ValueError, "a probability", "1.5")
    yield reject("rng-absent", "rng", None, TypeError, "type Tensor", "None")
    yield reject("packed-count", "packed", [w0], ValueError, "length 2", "1")
    yield reject(
        "packed-dtype", "packed", [w0, w1], TypeError, "dtype uint8", "float32", at="packed[0]"
    )


def _rejects() -> Iterator[Reject]:
    op = "lora_projections"
    args = _arguments(_SHAPES[0], FLOAT32, torch.device("cpu"))
    x, biases = args[0], args[4]
    yield from _shared_rejects(op, args)
    reject = rejecter(op, args)
    yield reject("x-columns", "x", x[..., :6], ValueError, "shape (..., 7)", "(2, 3, 6)")
    yield reject("x-integer", "x", x.int(), TypeError, "dtype float32", "int32")
    yield reject("biases-count", "biases", biases[:1], ValueError, "length 2", "1")
    yield reject(
        "bias-shape",
        "biases",
        [biases[0][:4], biases[1]],
        ValueError,
        "shape (5,)",
        "(4,)",
        at="biases[0]",
    )


def _backward_rejects() -> Iterator[Reject]:
    op = "lora_projections_backward"
    args = _gradient_arguments(_SHAPES[0], _ALL, FLOAT32, torch.device("cpu"))
    grads, x, xas = args[0], args[1], args[5]
    yield from _shared_rejects(op, args)
    reject = rejecter(op, args)
    yield reject("grads-none", "grads", [], ValueError, "one gradient per projection", "0")
    yield reject(
        "grad-shape",
        "grads",
        [grads[0], grads[1][:1]],
        ValueError,
        "shape (2, 3, 3)",
        "(1, 3, 3)",
        at="grads[1]",
    )
    yield reject("x-absent", "x", None, TypeError, "type Tensor", "None")
    yield reject("x-rows", "x", x[:1], ValueError, "shape (2, 3, 7)", "(1, 3, 7)")
    yield reject("xas-count", "xas", xas[:1], ValueError, "length 2", "1")
    yield reject("need-short", "need", [True], ValueError, "11 flags", "1")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "lora_projections": _samples,
    "lora_projections_backward": _backward_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "lora_projections": _rejects,
    "lora_projections_backward": _backward_rejects,
}
