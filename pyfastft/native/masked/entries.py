"""masked_gather, masked_scatter_ and masked_merge on the CPU library."""

from __future__ import annotations

from array import array
from typing import Any

import torch

from pyfastft import _native
from pyfastft._native import DTYPES
from pyfastft._op import implement
from pyfastft.native.masked._rectangles import cpu_unsupported, refuse_index, sizes
from pyfastft.ops.masked._rectangles import matrix_of


@implement("masked_gather", "cpu", unsupported=cpu_unsupported)
def masked_gather(
    values: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, rows: int, columns: int
) -> None:
    index = index.contiguous()
    try:
        _native.cpu().masked_gather(
            values=values.data_ptr(),
            weight=weight.data_ptr(),
            index=index.data_ptr(),
            stride=matrix_of(weight)[1],
            size=weight.numel(),
            dtype=DTYPES[weight.dtype],
            threads=torch.get_num_threads(),
            **sizes(index, rows, columns),
        )
    except RuntimeError as error:
        refuse_index("masked_gather", error)


@implement("masked_scatter_", "cpu", unsupported=cpu_unsupported)
def masked_scatter_(
    weight: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    rows: int,
    columns: int,
    alpha: float | None,
) -> None:
    index, values = index.contiguous(), values.contiguous()
    factor = array("f", [] if alpha is None else [alpha])
    try:
        _native.cpu().masked_scatter(
            weight=weight.data_ptr(),
            values=values.data_ptr(),
            index=index.data_ptr(),
            alpha=0 if alpha is None else factor.buffer_info()[0],
            stride=matrix_of(weight)[1],
            size=weight.numel(),
            values_dtype=DTYPES[values.dtype],
            dtype=DTYPES[weight.dtype],
            threads=torch.get_num_threads(),
            **sizes(index, rows, columns),
        )
    except RuntimeError as error:
        refuse_index("masked_scatter_", error)


def _merge_unsupported(*_: Any) -> str | None:
    return _native.why_no_cpu()


@implement("masked_merge", "cpu", unsupported=_merge_unsupported)
def masked_merge(
    merged: torch.Tensor,
    source: torch.Tensor,
    index: torch.Tensor,
    kept: torch.Tensor,
    grown: torch.Tensor,
) -> None:
    index, kept, grown = index.contiguous(), kept.contiguous(), grown.contiguous()
    try:
        _native.cpu().masked_merge(
            merged=merged.data_ptr(),
            source=source.data_ptr(),
            index=index.data_ptr(),
            kept=kept.data_ptr(),
            grown=grown.data_ptr(),
            count=index.shape[0],
            kept_count=kept.shape[0],
            grown_count=grown.shape[0],
            index_bytes=index.element_size(),
        )
    except RuntimeError as error:
        argument = "kept" if ": kept" in str(error) else "grown"
        refuse_index("masked_merge", error, argument)
