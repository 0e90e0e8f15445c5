"""Samples of int4_linear_a4."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import FLOAT32, Precision, Reject, Sample, rejecter
from pyfastft.testing.samples.ptq4 import int4_linear_a8
from pyfastft.testing.samples.ptq4._weights import Int4Shape, weight_rejects
from pyfastft.testing.samples.ptq4.fake_quantize4 import learned_range, range_rejects

# Those of int4_linear_a8, zeros being integers; half of them with a range for each group.
SHAPES = tuple(
    replace(shape, zero="uint8" if shape.zero == "float" else shape.zero)
    for shape in int4_linear_a8.SHAPES
)
_GROUPED = {shape.name for shape in SHAPES[::2]}


def arguments(shape: Int4Shape, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """The op's arguments."""
    *operands, group = int4_linear_a8.arguments(shape, precision, device)
    groups = -(-shape.k // shape.group) if shape.name in _GROUPED else 1
    return *operands, *learned_range(shape.name, groups, precision, device), group


def _samples() -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample("int4_linear_a4", shape.name, partial(arguments, shape), shape.large)


def _rejects() -> Iterator[Reject]:
    shape = Int4Shape("odd", (2, 3), 5, 7, 4, zero="uint8")
    args = arguments(shape, FLOAT32, torch.device("cpu"))
    x, codes, scale, zero, bias, perm, x_scale, x_zero = args[:8]
    reject = rejecter("int4_linear_a4", args)
    weight = (codes, scale, zero, perm)
    yield from weight_rejects(reject, weight, codebooks=False)
    yield from range_rejects(reject, x_scale, x_zero)
    yield reject("x-integer", "x", x.int(), TypeError, "dtype float32", "int32")
    yield reject("bias-shape", "bias", bias[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("zero-float", "zero", zero.float(), TypeError, "dtype uint8", "float32")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {"int4_linear_a4": _samples}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {"int4_linear_a4": _rejects}
