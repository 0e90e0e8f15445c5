"""Entries of a weight copied out and in, and two indices merged."""

from __future__ import annotations

import torch

from pyfastft import _alloc
from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, not_differentiable
from pyfastft.ops.masked._rectangles import (
    INDEX_DTYPES,
    expect_rectangles,
    expect_weight,
    matrix_of,
    wide,
)


@define("(Tensor weight, Tensor index, SymInt rows, SymInt columns) -> Tensor values")
def masked_gather(
    weight: torch.Tensor, index: torch.Tensor, rows: int = 1, columns: int = 1
) -> torch.Tensor:
    """values = the weight's entries at the rectangles, bit for bit; of the weight's dtype.

    weight (N, ...), C-contiguous; index (count,), int32 or int64. Output (count * rows * columns,).
    """
    op = "masked_gather"
    expect_weight(op, "weight", weight, None)
    expect_dense(op, weight.device, index=index)
    return _alloc.empty(
        (expect_rectangles(op, "index", index, rows, columns, *matrix_of(weight)),), like=weight
    )


@define(
    "(Tensor(a!) weight, Tensor values, Tensor index, SymInt rows, SymInt columns, float? alpha)"
    " -> ()"
)
def masked_scatter_(
    weight: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    rows: int = 1,
    columns: int = 1,
    alpha: float | None = None,
) -> None:
    """weight = values at the rectangles; with alpha, weight += alpha * values in float32.

    values (count * rows * columns,), of the weight's dtype or float32 (float64 beside float64),
    rounded once to nearest.
    """
    op = "masked_scatter_"
    expect_weight(op, "weight", weight, None)
    expect_dense(op, weight.device, values=values, index=index)
    count = expect_rectangles(op, "index", index, rows, columns, *matrix_of(weight))
    expect_shape(op, "values", values, (count,), "to match the rectangles")
    expect_dtype(op, "values", values, (weight.dtype, wide(weight.dtype)), "beside weight")


@define("(Tensor index, Tensor kept, Tensor grown) -> (Tensor merged, Tensor source)")
def masked_merge(
    index: torch.Tensor, kept: torch.Tensor, grown: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries index[kept] and those grown, ascending, and where each comes from.

    index (count,); kept: ascending places in it, int64; grown: ascending, of index's dtype, none of
    those kept. Outputs merged, of index's dtype, and source, int64: the place in index, or -1.
    """
    op = "masked_merge"
    expect_dense(op, None, index=index)
    expect_dense(op, index.device, kept=kept, grown=grown)
    expect_dtype(op, "index", index, INDEX_DTYPES)
    expect_dtype(op, "kept", kept, (torch.int64,))
    expect_dtype(op, "grown", grown, (index.dtype,), "to match index")
    for arg, tensor in (("index", index), ("kept", kept), ("grown", grown)):
        expect_shape(op, arg, tensor, ("count",))
    if kept.shape[0] > index.shape[0]:
        reject(op, "kept", f"at most {index.shape[0]} places", kept.shape[0])
    count = kept.shape[0] + grown.shape[0]
    return (
        _alloc.empty((count,), like=index),
        _alloc.empty((count,), like=index, dtype=torch.int64),
    )


not_differentiable("masked_gather")
