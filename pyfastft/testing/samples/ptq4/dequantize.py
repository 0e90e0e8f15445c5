"""Samples of int4_dequantize."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import FLOAT32, Precision, Reject, Sample, rejecter
from pyfastft.testing.samples.ptq4._weights import SHAPES, Int4Shape, weight, weight_rejects


def arguments(shape: Int4Shape, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """The op's arguments."""
    operands = weight(shape, precision, device)
    return *operands, shape.k, shape.group, shape.codebook, precision.base


def _samples() -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample("int4_dequantize", shape.name, partial(arguments, shape), shape.large)


def _rejects() -> Iterator[Reject]:
    args = arguments(SHAPES[0], FLOAT32, torch.device("cpu"))
    reject = rejecter("int4_dequantize", args)
    yield from weight_rejects(reject, args[:4])
    yield reject("k-negative", "k", -1, ValueError, "a size", "-1")
    yield reject("dtype", "dtype", torch.int32, TypeError, "float32 or bfloat16", "int32")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {"int4_dequantize": _samples}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {"int4_dequantize": _rejects}
