"""Sample arguments of every op, and arguments that every op must reject.

Per op the samples hold one row, sizes off every tile, rank 1, permuted-dense inputs, a
non-contiguous slice, no elements, and leading batch dimensions. Tests and benchmarks enumerate
them through :func:`samples` and :func:`rejects`; a new op adds its builder to the file of its name
in its family's folder here, and nothing anywhere else.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from pyfastft._op import REGISTRY
from pyfastft.testing.samples._base import (
    FLOAT32,
    FLOAT64,
    PRECISIONS,
    Precision,
    Reject,
    Sample,
    flat,
    outputs_of,
    upcast,
)

__all__ = [
    "FLOAT32",
    "FLOAT64",
    "PRECISIONS",
    "Precision",
    "Reject",
    "Sample",
    "flat",
    "outputs_of",
    "rejects",
    "samples",
    "upcast",
]


def samples(op: str) -> Iterator[Sample]:
    """All samples of an op."""
    return iter(_family(op).SAMPLES[op]())


def rejects(op: str) -> Iterator[Reject]:
    """All arguments that an op must reject."""
    return iter(_family(op).REJECTS[op]())


def _family(op: str) -> Any:
    return importlib.import_module(f"{__name__}.{REGISTRY[op].family}")
