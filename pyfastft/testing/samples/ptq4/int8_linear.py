"""Samples of int8_linear and its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import FLOAT32, Drawer, Precision, Reject, Sample, rejecter


@dataclass(frozen=True)
class Int8Shape:
    """One layer's sizes, and what is special about its operands."""

    name: str
    leading: tuple[int, ...]
    n: int
    k: int
    bias: bool = True
    layout: str = "contiguous"
    large: bool = False


SHAPES = (
    Int8Shape("odd", (2, 3), 5, 7),
    Int8Shape("vector", (), 5, 16),
    Int8Shape("one-row", (1,), 19, 24, bias=False),
    Int8Shape("one-column", (6,), 1, 1),
    Int8Shape("leading-dims", (2, 2, 3), 17, 32, bias=False),
    Int8Shape("permuted-dense", (6, 5), 12, 16, layout="permuted"),
    Int8Shape("slice", (9,), 18, 23, layout="slice"),
    Int8Shape("expanded", (8,), 16, 16, layout="expanded"),
    Int8Shape("transposed-codes", (9,), 33, 40, layout="transposed-codes"),
    Int8Shape("sliced-codes", (3,), 33, 40, layout="sliced-codes"),
    Int8Shape("no-rows", (0,), 5, 7),
    Int8Shape("no-columns", (3,), 0, 7),
    Int8Shape("no-inputs", (3,), 5, 0),
    Int8Shape("off-tile", (3, 37), 131, 101, large=True),
    Int8Shape("several-tiles", (150,), 200, 264, large=True),
    Int8Shape("deep", (33,), 40, 1000, large=True),
    Int8Shape("deep-one-row", (1,), 90, 1100, large=True),
    Int8Shape("wide", (6,), 900, 70, large=True),
)


def _operands(shape: Int8Shape, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """x, codes, scale and bias."""
    draw, k, n = Drawer(shape.name, precision, device), shape.k, shape.n
    if shape.layout == "permuted":
        x = draw.base(*shape.leading[::-1], k).transpose(0, 1)
    elif shape.layout == "slice":
        x = draw.base(*shape.leading, 2 * k + 3)[..., 3::2]
    elif shape.layout == "expanded":
        x = draw.base(1, k).expand(*shape.leading, k)
    else:
        x = draw.base(*shape.leading, k)
    size = (k, n) if shape.layout == "transposed-codes" else (n, k)
    codes = torch.randint(-128, 128, size, generator=draw.generator, dtype=torch.int8)
    if shape.layout == "transposed-codes":
        codes = codes.T
    elif shape.layout == "sliced-codes":
        codes = codes.repeat_interleave(2, dim=1)[:, ::2]
    scale = (0.5 + draw.wide(n).abs()) * (64 * max(k, 1) ** 0.5) ** -1
    return x, codes.to(device), scale, draw.base(n) if shape.bias else None


def _gradient_arguments(
    shape: Int8Shape, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    x, codes, scale, _ = _operands(shape, precision, device)
    size = (*shape.leading, shape.n)
    if shape.layout == "expanded":
        grad = torch.ones((), dtype=precision.base, device=device).expand(size)
    elif shape.layout == "slice":
        grad = Drawer("grad slice", precision, device).base(*shape.leading, 2 * shape.n)[..., ::2]
    else:
        grad = Drawer(f"grad {shape.name}", precision, device).base(*size)
    return grad, x if need[1] else None, codes, scale, list(need)


_ALL = (True,) * 3
_NEEDS = {"x": (True, False, False), "scale": (False, True, False), "bias": (False, False, True)}


def _forward_samples() -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample("int8_linear", shape.name, partial(_operands, shape), shape.large)


def _backward_samples() -> Iterator[Sample]:
    cases = [(shape, _ALL, shape.name) for shape in SHAPES]
    cases += [(SHAPES[0], need, f"{SHAPES[0].name}-{name}") for name, need in _NEEDS.items()]
    for shape, need, name in cases:
        build = partial(_gradient_arguments, shape, need)
        yield Sample("int8_linear_backward", name, build, shape.large)


def _shared_rejects(op: str, args: tuple[Any, ...]) -> Iterator[Reject]:
    reject = rejecter(op, args)
    codes, scale = args[2:4] if op.endswith("_backward") else args[1:3]
    yield reject("codes-1d", "codes", codes[0], ValueError, "shape (N, K)", "(7,)")
    yield reject("codes-dtype", "codes", codes.int(), TypeError, "dtype int8", "int32")
    yield reject("codes-list", "codes", [1], TypeError, "type Tensor", "list")
    yield reject("codes-sparse", "codes", codes.to_sparse(), TypeError, "a dense", "sparse_coo")
    yield reject("scale-shape", "scale", scale[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("scale-dtype", "scale", scale.half(), TypeError, "dtype float32", "float16")
    yield reject("scale-device", "scale", scale.to("meta"), ValueError, "device cpu", "meta")


def _forward_rejects() -> Iterator[Reject]:
    args = _operands(SHAPES[0], FLOAT32, torch.device("cpu"))
    yield from _shared_rejects("int8_linear", args)
    reject, x, bias = rejecter("int8_linear", args), args[0], args[3]
    yield reject("x-columns", "x", x[..., :6], ValueError, "shape (2, 3, 7)", "(2, 3, 6)")
    yield reject("x-scalar", "x", x[0, 0, 0], ValueError, "at least one dimension", "a scalar")
    yield reject("x-integer", "x", x.int(), TypeError, "dtype float32", "int32")
    yield reject("bias-shape", "bias", bias[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("bias-dtype", "bias", bias.double(), TypeError, "dtype float32", "float64")


def _backward_rejects() -> Iterator[Reject]:
    op = "int8_linear_backward"
    args = _gradient_arguments(SHAPES[0], _ALL, FLOAT32, torch.device("cpu"))
    yield from _shared_rejects(op, args)
    reject, grad, x = rejecter(op, args), args[0], args[1]
    yield reject("grad-columns", "grad", grad[..., :4], ValueError, "shape (2, 3, 5)", "(2, 3, 4)")
    yield reject("x-absent", "x", None, TypeError, "type Tensor", "None")
    yield reject("x-columns", "x", x[..., :6], ValueError, "shape (2, 3, 7)", "(2, 3, 6)")
    yield reject("x-dtype", "x", x.half(), TypeError, "dtype float32", "float16")
    yield reject("need-short", "need", [True], ValueError, "three flags", "1")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "int8_linear": _forward_samples,
    "int8_linear_backward": _backward_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "int8_linear": _forward_rejects,
    "int8_linear_backward": _backward_rejects,
}
