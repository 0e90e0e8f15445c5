"""What the kernels of the family share: where a value stands, and many tensors in one launch.

A launch over many tensors reads a table of int64 on the device, one row for each tensor, whose
first field counts the blocks of the tensors before it; a program finds its row by it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from pyfastft.triton_kernels._common import why_no_triton

# Nothing is fused: what a test compares bit for bit is what the source says.
EXACT_OPTIONS = {"enable_fp_fusion": False, "maxnreg": 255}


def unsupported(first: Any, *_: Any) -> str | None:
    """Why Triton cannot run an op whose first argument, or a tensor of its first list, is this."""
    for one in first if isinstance(first, list | tuple) else (first,):
        if (why := why_no_triton(one)) is not None:
            return why
    return None


def search_steps(count: int) -> int:
    """Halvings after which a search among so many has one left."""
    return max(count, 1).bit_length()


@triton.jit
def tensor_of(table_ptr, block, count, FIELDS: tl.constexpr, STEPS: tl.constexpr):
    """The number of a block's tensor: the last whose blocks begin at or before it."""
    low = tl.zeros((), tl.int64)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        within = tl.load(table_ptr + middle * FIELDS) <= block
        low = tl.where(within, middle, low)
        high = tl.where(within, high, middle)
    return low


@triton.jit
def lower_bound(list_ptr, count, wanted, STEPS: tl.constexpr):
    """How many of an ascending list are below each of what is wanted; int64."""
    low = tl.zeros_like(wanted)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        found = tl.load(list_ptr + middle, mask=open_, other=0).to(tl.int64)
        below = open_ & (found < wanted)
        high = tl.where(open_ & (found >= wanted), middle, high)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def offsets_of_values(
    index_ptr,
    first,
    count,
    rows,
    columns,
    stride,
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where BLOCK values from number ``first`` on stand in a weight, and which of them there are.

    ``count`` values in all, of rectangles of rows x columns in a weight with rows of ``stride``;
    ELEMENTS: a rectangle is one element.
    """
    value = first + tl.arange(0, BLOCK)
    there = value < count
    if ELEMENTS:
        offset = tl.load(index_ptr + value, mask=there, other=0).to(tl.int64)
    else:
        line = value // columns
        rectangle = line // rows
        corner = tl.load(index_ptr + rectangle, mask=there, other=0).to(tl.int64)
        offset = corner + (line - rectangle * rows) * stride + value - line * columns
    return offset, there
