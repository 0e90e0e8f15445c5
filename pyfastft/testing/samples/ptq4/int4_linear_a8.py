"""Samples of int4_linear_a8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import FLOAT32, Drawer, Precision, Reject, Sample, rejecter
from pyfastft.testing.samples.ptq4._weights import Int4Shape, activation, weight, weight_rejects

# None has fewer than 400 elements: a gradient straight through a rounding is not what the finite
# differences of the tests for tiny samples see.
SHAPES = (
    Int4Shape("odd", (2, 3), 35, 37, 5, zero="uint8"),
    Int4Shape("vector", (), 26, 40, 8, zero="uint8"),
    Int4Shape("one-row", (1,), 19, 72, 8, bias=False),
    Int4Shape("per-channel", (4,), 29, 42, 64, zero="uint8"),
    Int4Shape("float-zero", (2, 2, 3), 17, 64, 16, zero="float", half_scale=True, bias=False),
    Int4Shape("perm", (6,), 18, 48, 8, zero="uint8", perm=True),
    Int4Shape("perm-odd", (3,), 36, 33, 5, zero="float", perm=True),
    Int4Shape("permuted-dense", (6, 5), 12, 16, 8, layout="permuted"),
    Int4Shape("slice", (19,), 18, 23, 8, zero="uint8", layout="slice"),
    Int4Shape("expanded", (8,), 36, 32, 8, layout="expanded"),
    Int4Shape("sliced-codes", (5,), 16, 48, 8, layout="codes"),
    Int4Shape("no-rows", (0,), 5, 8, 4),
    Int4Shape("no-columns", (3,), 0, 8, 4, zero="uint8"),
    Int4Shape("no-inputs", (3,), 5, 0, 4),
    Int4Shape("off-tile", (3, 37), 131, 101, 16, zero="uint8", large=True),
    Int4Shape("ragged", (33,), 70, 300, 128, zero="float", large=True),
    Int4Shape("several-tiles", (150,), 200, 320, 64, half_scale=True, large=True),
    Int4Shape("deep-one-row", (1,), 90, 1100, 128, zero="float", large=True),
    Int4Shape("one-group", (20,), 70, 900, 1024, large=True),
    Int4Shape("perm-tiles", (40,), 75, 160, 32, zero="uint8", perm=True, large=True),
)


def arguments(shape: Int4Shape, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """The op's arguments."""
    codes, scale, zero, perm = weight(shape, precision, device)
    bias = None
    if shape.bias:
        bias = Drawer(f"bias {shape.name}", precision, device).base(shape.n)
    return activation(shape, precision, device), codes, scale, zero, bias, perm, shape.group


def _samples() -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample("int4_linear_a8", shape.name, partial(arguments, shape), shape.large)


def _rejects() -> Iterator[Reject]:
    shape = Int4Shape("rejects", (2, 3), 5, 7, 4, zero="float")
    args = arguments(shape, FLOAT32, torch.device("cpu"))
    x, codes, scale, zero, bias, perm = args[:6]
    reject = rejecter("int4_linear_a8", args)
    yield from weight_rejects(reject, (codes, scale, zero, perm), codebooks=False)
    yield reject("x-scalar", "x", x[0, 0, 0], ValueError, "at least one dimension", "a scalar")
    yield reject("x-integer", "x", x.int(), TypeError, "dtype float32", "int32")
    yield reject("bias-shape", "bias", bias[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("bias-dtype", "bias", bias.double(), TypeError, "dtype float32", "float64")
    k = (1 << 20) + 2
    wide_x, wide_codes = x[:1, :1, :1].expand(1, 1, k), codes[:1, :1].expand(1, k // 2)
    wide = (wide_x, wide_codes, scale[:1, :1], None, None, None)
    yield rejecter("int4_linear_a8", (*wide, k))(
        "group-too-long", "group_size", k, ValueError, "at most 1048576", str(k)
    )


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {"int4_linear_a8": _samples}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {"int4_linear_a8": _rejects}
