"""Samples of int4_linear and its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import FLOAT32, Drawer, Precision, Reject, Sample, rejecter
from pyfastft.testing.samples.ptq4._weights import (
    SHAPES,
    Int4Shape,
    activation,
    weight,
    weight_rejects,
)


def arguments(shape: Int4Shape, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """The forward's arguments."""
    codes, scale, zero, perm = weight(shape, precision, device)
    bias = None
    if shape.bias:
        bias = Drawer(f"bias {shape.name}", precision, device).base(shape.n)
    x = activation(shape, precision, device)
    return x, codes, scale, zero, bias, perm, None, shape.group, shape.codebook


def gradient_arguments(
    shape: Int4Shape, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    """The backward's."""
    codes, scale, zero, perm = weight(shape, precision, device)
    x = activation(shape, precision, device)
    size = (*x.shape[:-1], shape.n)
    if shape.layout == "expanded":
        grad = torch.ones((), dtype=precision.base, device=device).expand(size)
    else:
        grad = Drawer(f"grad {shape.name}", precision, device).base(*size)
    need = (*need[:2], need[2] and shape.zero == "float", need[3])
    read = x if need[1] or need[2] else None
    operands = (grad, read, codes, scale, zero, perm, None, shape.k, shape.group, shape.codebook)
    return *operands, list(need)


_ALL = (True,) * 4
_NEEDS = {
    "input": (True, False, False, False),
    "scale": (False, True, False, False),
    "zero": (False, False, True, False),
    "bias": (False, False, False, True),
}


def _forward_samples() -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample("int4_linear", shape.name, partial(arguments, shape), shape.large)


def _backward_samples() -> Iterator[Sample]:
    cases = [(shape, _ALL, shape.name) for shape in SHAPES]
    base = SHAPES[0]
    cases += [(base, need, f"{base.name}-{name}") for name, need in _NEEDS.items()]
    for shape, need, name in cases:
        build = partial(gradient_arguments, shape, need)
        yield Sample("int4_linear_backward", name, build, shape.large)


def _forward_rejects() -> Iterator[Reject]:
    args = arguments(SHAPES[0], FLOAT32, torch.device("cpu"))
    x, codes, scale, zero, bias, perm = args[:6]
    reject = rejecter("int4_linear", args)
    yield from weight_rejects(reject, (codes, scale, zero, perm))
    yield reject("x-scalar", "x", x[0, 0, 0], ValueError, "at least one dimension", "a scalar")
    yield reject("x-integer", "x", x.int(), TypeError, "dtype float32", "int32")
    yield reject("bias-shape", "bias", bias[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("bias-dtype", "bias", bias.double(), TypeError, "dtype float32", "float64")
    yield reject("packed-dtype", "packed", bias, TypeError, "dtype uint8", "float32")


def _backward_rejects() -> Iterator[Reject]:
    args = gradient_arguments(SHAPES[0], _ALL, FLOAT32, torch.device("cpu"))
    grad, x, codes, scale, zero, perm = args[:6]
    reject = rejecter("int4_linear_backward", args)
    yield from weight_rejects(reject, (codes, scale, zero, perm))
    yield reject("grad-columns", "grad", grad[..., :4], ValueError, "shape (2, 3, 5)", "(2, 3, 4)")
    yield reject("x-absent", "x", None, TypeError, "type Tensor", "None")
    yield reject("x-columns", "x", x[..., :6], ValueError, "shape (2, 3, 7)", "(2, 3, 6)")
    yield reject("x-dtype", "x", x.half(), TypeError, "dtype float32", "float16")
    yield reject("need-short", "need", [True] * 3, ValueError, "four flags", "3")
    integers = zero.byte()
    yield reject("zero-integer", "zero", integers, TypeError, "a float dtype", "uint8")
    yield reject("zero-absent", "zero", None, TypeError, "a float dtype", "None")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "int4_linear": _forward_samples,
    "int4_linear_backward": _backward_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "int4_linear": _forward_rejects,
    "int4_linear_backward": _backward_rejects,
}
