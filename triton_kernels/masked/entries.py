"""masked_gather, masked_scatter_ and masked_merge on Triton: a thread for a value."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft._op import implement
from pyfastft.ops.masked._rectangles import expect_index, expect_places, matrix_of, reject_grown
from pyfastft.triton_kernels._common import INTERPRETED, why_no_triton
from pyfastft.triton_kernels.masked._rectangles import (
    EXACT_OPTIONS,
    lower_bound,
    offsets_of_values,
    search_steps,
    unsupported,
)

_BLOCK = 1024
_NOWHERE = -2


@triton.jit
def _masked_gather_kernel(
    values_ptr,
    weight_ptr,
    index_ptr,
    count,
    rows,
    columns,
    stride,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes values (count,) = the weight's entries at the rectangles; a program, a block."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset, there = offsets_of_values(
        index_ptr, first, count, rows, columns, stride, ELEMENTS, BLOCK
    )
    entries = tl.load(weight_ptr + offset, mask=there)
    tl.store(values_ptr + first + tl.arange(0, BLOCK), entries, mask=there)


@triton.jit
def _masked_scatter_kernel(
    weight_ptr,
    values_ptr,
    index_ptr,
    alpha,
    count,
    rows,
    columns,
    stride,
    ADD: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes values (count,) into the weight, or ADDs alpha times them in float32."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset, there = offsets_of_values(
        index_ptr, first, count, rows, columns, stride, ELEMENTS, BLOCK
    )
    entries = tl.load(values_ptr + first + tl.arange(0, BLOCK), mask=there)
    if ADD:
        old = tl.load(weight_ptr + offset, mask=there).to(tl.float32)
        entries = old + alpha * entries.to(tl.float32)
    tl.store(weight_ptr + offset, entries.to(weight_ptr.dtype.element_ty), mask=there)


@triton.jit
def _masked_merge_kernel(
    merged_ptr,
    source_ptr,
    index_ptr,
    kept_ptr,
    grown_ptr,
    kept,
    grown,
    KEPT_STEPS: tl.constexpr,
    GROWN_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges two ascending lists, of which one is index[kept]: an entry's place is its own number
    and how many of the other list are below it."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_kept = number < kept
    place = tl.load(kept_ptr + number, mask=is_kept, other=0)
    entry = tl.load(index_ptr + place, mask=is_kept, other=0)
    others = lower_bound(grown_ptr, grown, entry.to(tl.int64), GROWN_STEPS)
    tl.store(merged_ptr + number + others, entry, mask=is_kept)
    tl.store(source_ptr + number + others, place, mask=is_kept)

    number -= kept
    is_grown = (number >= 0) & (number < grown)
    entry = tl.load(grown_ptr + number, mask=is_grown, other=0)
    wanted = entry.to(tl.int64)
    low = tl.zeros_like(wanted)
    high = low + kept
    for _ in range(KEPT_STEPS):
        middle = (low + high) // 2
        open_ = low < high
        at = tl.load(kept_ptr + middle, mask=open_, other=0)
        found = tl.load(index_ptr + at, mask=open_, other=0).to(tl.int64)
        high = tl.where(open_ & (found >= wanted), middle, high)
        low = tl.where(open_ & (found < wanted), middle + 1, low)
    tl.store(merged_ptr + number + low, entry, mask=is_grown)
    tl.store(source_ptr + number + low, tl.full((BLOCK,), -1, tl.int64), mask=is_grown)


# -- launchers -------------------------------------------------------------------------------------


@implement("masked_gather", "triton", unsupported=unsupported)
def masked_gather(
    values: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, rows: int, columns: int
) -> None:
    n, k = matrix_of(weight)
    expect_index("masked_gather", index, rows, columns, n, k)
    if not values.numel():
        return
    with torch.cuda.device_of(weight):
        _masked_gather_kernel[(triton.cdiv(values.numel(), _BLOCK),)](
            values,
            weight,
            index.contiguous(),
            values.numel(),
            rows,
            columns,
            k,
            ELEMENTS=rows * columns == 1,
            BLOCK=_BLOCK,
            num_warps=4,
            num_stages=1,
            **EXACT_OPTIONS,
        )


@implement("masked_scatter_", "triton", unsupported=unsupported)
def masked_scatter_(
    weight: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    rows: int,
    columns: int,
    alpha: float | None,
) -> None:
    n, k = matrix_of(weight)
    expect_index("masked_scatter_", index, rows, columns, n, k)
    if not values.numel():
        return
    with torch.cuda.device_of(weight):
        _masked_scatter_kernel[(triton.cdiv(values.numel(), _BLOCK),)](
            weight,
            values.contiguous(),
            index.contiguous(),
            0.0 if alpha is None else alpha,
            values.numel(),
            rows,
            columns,
            k,
            ADD=alpha is not None,
            ELEMENTS=rows * columns == 1,
            BLOCK=_BLOCK,
            num_warps=4,
            num_stages=1,
            **EXACT_OPTIONS,
        )


def _merge_unsupported(index: torch.Tensor, *_: Any) -> str | None:
    return None if INTERPRETED else why_no_triton(index)


@implement("masked_merge", "triton", unsupported=_merge_unsupported)
def masked_merge(
    merged: torch.Tensor,
    source: torch.Tensor,
    index: torch.Tensor,
    kept: torch.Tensor,
    grown: torch.Tensor,
) -> None:
    expect_places(index, kept)
    merge(merged, source, index, kept, grown)
    # An entry of both lists is written twice, and another place never.
    if bool((grown[1:] <= grown[:-1]).any()) or bool((source == _NOWHERE).any()):
        reject_grown()


def merge(
    merged: torch.Tensor,
    source: torch.Tensor,
    index: torch.Tensor,
    kept: torch.Tensor,
    grown: torch.Tensor,
) -> None:
    """masked_merge of lists that are not checked; source is -2 at places that stay unwritten."""
    index, kept, grown = index.contiguous(), kept.contiguous(), grown.contiguous()
    source.fill_(_NOWHERE)
    if not merged.numel():
        return
    with torch.cuda.device_of(index):
        _masked_merge_kernel[(triton.cdiv(merged.numel(), _BLOCK),)](
            merged,
            source,
            index,
            kept,
            grown,
            kept.numel(),
            grown.numel(),
            KEPT_STEPS=search_steps(kept.numel()),
            GROWN_STEPS=search_steps(grown.numel()),
            BLOCK=_BLOCK,
            num_warps=4,
            num_stages=1,
            **EXACT_OPTIONS,
        )
