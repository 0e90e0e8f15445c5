"""Samples of masked_gather, masked_scatter_ and masked_merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import FLOAT32, Drawer, Precision, Reject, Sample, rejecter
from pyfastft.testing.samples.masked._rectangles import PARTS, Part

_CUBE = Part((3, 4, 5), 1, 5, 6)


def _gather(name: str, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    part = _CUBE if name == "three-dimensions" else PARTS[name]
    weight = Drawer(name, precision, device).base(*part.shape)
    return weight, part.index(name, device), part.rows, part.columns


def _scatter(
    name: str, alpha: float | None, wide: bool, precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    weight, index, rows, columns = _gather(name, precision, device)
    draw = Drawer(f"values {name}", precision, device)
    values = (draw.wide if wide else draw.base)(index.shape[0] * rows * columns)
    return weight, values, index, rows, columns, alpha


def _gather_samples() -> Iterator[Sample]:
    for name in (*PARTS, "three-dimensions"):
        large = name in PARTS and PARTS[name].large
        yield Sample("masked_gather", name, partial(_gather, name), large)


def _scatter_samples() -> Iterator[Sample]:
    for name in PARTS:
        several = (("set", None, False), ("add", 0.5, False), ("wide", None, True))
        for label, alpha, wide in several if name in ("elements", "blocks") else several[1:2]:
            build = partial(_scatter, name, alpha, wide)
            yield Sample("masked_scatter_", f"{name}-{label}", build, PARTS[name].large)


_LISTS = {
    "interleaved": ([2, 5, 7, 11, 20], [0, 2, 4], [6, 8, 30]),
    "all-dropped": ([2, 5], [], [1, 9]),
    "none-grown": ([2, 5, 9], [0, 2], []),
    "a-dropped-entry-grown": ([2, 5, 9], [0, 2], [5]),
    "empty": ([], [], []),
}


def _merge(
    name: str, dtype: torch.dtype, precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    index, kept, grown = _LISTS[name]
    return (
        torch.tensor(index, dtype=dtype, device=device),
        torch.tensor(kept, dtype=torch.int64, device=device),
        torch.tensor(grown, dtype=dtype, device=device),
    )


def _merge_samples() -> Iterator[Sample]:
    for name in _LISTS:
        for dtype in (torch.int32, torch.int64):
            label = f"{name}-{str(dtype).removeprefix('torch.')}"
            yield Sample("masked_merge", label, partial(_merge, name, dtype))


def _gather_rejects() -> Iterator[Reject]:
    op = "masked_gather"
    args = _gather("blocks", FLOAT32, torch.device("cpu"))
    reject = rejecter(op, args)
    weight, index = args[:2]
    yield reject("weight-strides", "weight", weight.T, ValueError, "C-contiguous", "(1, 20)")
    yield reject("weight-integer", "weight", weight.int(), TypeError, "dtype float32", "int32")
    yield reject("weight-scalar", "weight", weight[0, 0], ValueError, "shape (N, ...)", "()")
    yield reject("index-float", "index", index.float(), TypeError, "dtype int32", "float32")
    yield reject("index-2d", "index", index[None], ValueError, "shape (count,)", "(1, 6)")
    yield reject("rows", "rows", 5, ValueError, "a divisor of 12", "5")
    yield reject("columns", "columns", 0, ValueError, "at least 1", "0")


def _scatter_rejects() -> Iterator[Reject]:
    op = "masked_scatter_"
    args = _scatter("blocks", None, False, FLOAT32, torch.device("cpu"))
    reject = rejecter(op, args)
    weight, values = args[:2]
    yield reject("weight-strides", "weight", weight.T, ValueError, "C-contiguous", "(1, 20)")
    yield reject("values-short", "values", values[1:], ValueError, "shape (90,)", "(89,)")
    yield reject("values-half", "values", values.half(), TypeError, "dtype float32", "float16")
    yield reject("index-short", "index", args[2].short(), TypeError, "dtype int32", "int16")
    yield reject("columns", "columns", 7, ValueError, "a divisor of 20", "7")


def _merge_rejects() -> Iterator[Reject]:
    op = "masked_merge"
    args = _merge("interleaved", torch.int32, FLOAT32, torch.device("cpu"))
    reject = rejecter(op, args)
    yield reject("kept-int32", "kept", args[1].int(), TypeError, "dtype int64", "int32")
    yield reject("kept-long", "kept", args[1].repeat(2), ValueError, "at most 5", "6")
    yield reject("grown-int64", "grown", args[2].long(), TypeError, "dtype int32", "int64")
    yield reject("index-2d", "index", args[0][None], ValueError, "shape (count,)", "(1, 5)")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "masked_gather": _gather_samples,
    "masked_scatter_": _scatter_samples,
    "masked_merge": _merge_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "masked_gather": _gather_rejects,
    "masked_scatter_": _scatter_rejects,
    "masked_merge": _merge_rejects,
}
