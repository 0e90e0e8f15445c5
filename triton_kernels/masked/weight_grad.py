"""masked_weight_grad on Triton: products for rectangles, tiles and dot products for elements.

Symbols as in ``pyfastft/ops/masked.md``. dW is never formed: what leaves a program is the trained
part of its tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft._op import implement
from pyfastft.ops.masked._rectangles import expect_index
from pyfastft.triton_kernels._common import OPTIONS, device_of
from pyfastft.triton_kernels._plan import parts_of
from pyfastft.triton_kernels.masked._rectangles import (
    lower_bound,
    search_steps,
    unsupported,
)

# half -> (lines, columns, tokens, num_warps, num_stages) of a tile.
_TILES = {True: (64, 128, 64, 8, 3), False: (32, 64, 32, 4, 2)}
# What tensor cores take at least.
_NARROWEST = 16
# Entries of one row that leave a tile at a time, and tokens and entries of a dot product's tile.
_LEAVING, _ENTRIES, _TOKENS = 16, 16, 128
# Up to which density elements are dot products: there what an element reads from the second-level
# cache takes less than the whole product on tensor cores, and on FMA units. By the floors of
# masked.md, not measured.
_DOTS = {True: 0.005, False: 0.05}


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    lines,
    columns,
    has_line,
    has_column,
    begin,
    end,
    a_stride_m,
    a_stride_l,
    b_stride_m,
    b_stride_c,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """a[begin:end, lines]^T b[begin:end, columns] in float32."""
    acc = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_M):
        tokens = first + tl.arange(0, BLOCK_M).to(tl.int64)
        has_token = tokens < end
        a = tl.load(
            a_ptr + tokens[:, None] * a_stride_m + lines[None, :] * a_stride_l,
            mask=has_token[:, None] & has_line[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + tokens[:, None] * b_stride_m + columns[None, :] * b_stride_c,
            mask=has_token[:, None] & has_column[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    return acc


@triton.jit
def _rectangle_grad_kernel(
    values_ptr,
    a_ptr,
    b_ptr,
    index_ptr,
    M,
    K,
    count,
    rows,
    lines,
    width,
    part,
    total,
    a_stride_m,
    a_stride_l,
    b_stride_m,
    b_stride_c,
    WAY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes a[:, line]^T b at a tile of the lines of rectangles, over one part of the tokens.

    WAY "rows": all lines of all rectangles, each as wide as X, a is dY. "columns": single columns,
    a is X and b is dY. "blocks": a program for a tile of one rectangle, a is dY.
    """
    tile = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(2).to(tl.int64)
    to = values_ptr + split * total
    if WAY == "blocks":
        tiles = tl.cdiv(lines, BLOCK_L)
        rectangle = tile // tiles
        line = (tile - rectangle * tiles) * BLOCK_L + tl.arange(0, BLOCK_L)
        corner = tl.load(index_ptr + rectangle).to(tl.int64)
        at = corner // K + line
        b_ptr += (corner % K) * b_stride_c
        to += rectangle * lines * width
    else:
        line = tile * BLOCK_L + tl.arange(0, BLOCK_L)
        rectangle = line // rows
        corner = tl.load(index_ptr + rectangle, mask=line < lines, other=0).to(tl.int64)
        at = corner // K + line - rectangle * rows if WAY == "rows" else corner
    acc = _product(
        a_ptr,
        b_ptr,
        at,
        columns,
        line < lines,
        columns < width,
        split * part,
        tl.minimum(split * part + part, M),
        a_stride_m,
        a_stride_l,
        b_stride_m,
        b_stride_c,
        BLOCK_M,
        BLOCK_L,
        BLOCK_C,
    )
    mask = (line < lines)[:, None] & (columns < width)[None, :]
    tl.store(to + line[:, None] * width + columns[None, :], acc, mask=mask)


@triton.jit
def _element_grad_kernel(
    values_ptr,
    grad_ptr,
    x_ptr,
    index_ptr,
    M,
    N,
    K,
    count,
    part,
    grad_stride_m,
    grad_stride_n,
    x_stride_m,
    x_stride_k,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Computes a tile of dW in registers and stores its trained elements, BLOCK_E of a row at a
    time: the index ascends, so a row's elements within the tile are one run of it. A tile without
    any multiplies nothing."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1).to(tl.int64) * BLOCK_K
    split = tl.program_id(2).to(tl.int64)
    columns = column + tl.arange(0, BLOCK_K)
    corner = rows * K + column
    begin = lower_bound(index_ptr, count, corner, STEPS)
    end = lower_bound(index_ptr, count, rows * K + tl.minimum(column + BLOCK_K, K), STEPS)
    longest = tl.max(end - begin, axis=0)
    tokens = tl.where(longest > 0, tl.minimum(split * part + part, M), 0)
    acc = _product(
        grad_ptr,
        x_ptr,
        rows,
        columns,
        rows < N,
        columns < K,
        split * part,
        tokens,
        grad_stride_m,
        grad_stride_n,
        x_stride_m,
        x_stride_k,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    for first in range(0, longest, BLOCK_E):
        at = begin[:, None] + first + tl.arange(0, BLOCK_E)[None, :]
        there = at < end[:, None]
        offset = tl.load(index_ptr + at, mask=there, other=0).to(tl.int64)
        within = tl.where(there, offset - corner[:, None], 0).to(tl.int32)
        tl.store(values_ptr + split * count + at, tl.gather(acc, within, axis=1), mask=there)


@triton.jit
def _entry_grad_kernel(
    values_ptr,
    grad_ptr,
    x_ptr,
    index_ptr,
    M,
    K,
    count,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Computes BLOCK_E elements as dot products of rows of dY^T (N, M) and X^T (K, M).

    Both are C-contiguous. Elements of one row of W follow each other and share dY's in the
    first-level cache.
    """
    number = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    offset = tl.load(index_ptr + number, mask=number < count, other=0).to(tl.int64)
    row = offset // K
    grad_at, x_at = row * M, (offset - row * K) * M
    acc = tl.zeros((BLOCK_E, BLOCK_M), tl.float32)
    for first in range(0, M, BLOCK_M):
        tokens = first + tl.arange(0, BLOCK_M)
        mask = (number < count)[:, None] & (tokens < M)[None, :]
        dy = tl.load(grad_ptr + grad_at[:, None] + tokens[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + x_at[:, None] + tokens[None, :], mask=mask, other=0.0)
        acc += dy.to(tl.float32) * x.to(tl.float32)
    tl.store(values_ptr + number, tl.sum(acc, axis=1), mask=number < count)


# -- launcher --------------------------------------------------------------------------------------


def way_of(count: int, rows: int, columns: int, n: int, k: int, *, half: bool) -> str:
    """Which kernel computes so many rectangles: "rows", "columns", "blocks", "entries" as dot
    products, or "elements" of tiles."""
    if rows == columns == 1 and n > 1 and k > 1:
        return "entries" if count <= _DOTS[half] * n * k else "elements"
    if columns == k:
        return "rows"
    return "columns" if rows == n and columns == 1 else "blocks"


def _side(length: int, tile: int) -> int:
    return max(_NARROWEST, min(triton.next_power_of_2(length), tile))


@implement("masked_weight_grad", "triton", unsupported=unsupported)
def masked_weight_grad(
    values: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    rows: int,
    columns: int,
) -> None:
    n, k, count = grad.shape[-1], x.shape[-1], index.numel()
    expect_index("masked_weight_grad", index, rows, columns, n, k)
    if not values.numel():
        return
    grad, x = grad.reshape(-1, n), x.reshape(-1, k)
    m = grad.shape[0]
    if m == 0:
        values.zero_()
        return
    half = grad.dtype is not torch.float32
    way, index = way_of(count, rows, columns, n, k, half=half), index.contiguous()
    with torch.cuda.device_of(grad):
        if way == "entries":
            _entry_grad_kernel[(triton.cdiv(count, _ENTRIES),)](
                values,
                grad.T.contiguous(),
                x.T.contiguous(),
                index,
                m,
                k,
                count,
                BLOCK_E=_ENTRIES,
                BLOCK_M=_TOKENS,
                num_warps=4,
                num_stages=2,
                **OPTIONS,
            )
            return
        # What has the lines and what the columns of a tile, and how many.
        (a, b), lines, width = (grad, x), count * rows, columns
        if way == "columns":
            (a, b), lines, width = (x, grad), count, n
        elif way == "blocks":
            lines = rows
        elif way == "elements":
            lines, width = n, k
        block_l, block_c, block_m, num_warps, num_stages = _TILES[half]
        if way != "elements":
            block_l, block_c = _side(lines, block_l), _side(width, block_c)
        grid = (
            triton.cdiv(lines, block_l) * (count if way == "blocks" else 1),
            triton.cdiv(width, block_c),
        )
        splits, part = parts_of(m, block_m, grid[0] * grid[1], device_of(grad))
        parts = values.new_empty((splits, values.numel())) if splits > 1 else values
        options = {"num_warps": num_warps, "num_stages": num_stages, **OPTIONS}
        operands: tuple[Any, ...] = (parts, a, b, index, m)
        strides = (*a.stride(), *b.stride())
        if way == "elements":
            _element_grad_kernel[(*grid, splits)](
                *operands,
                n,
                k,
                count,
                part,
                *strides,
                STEPS=search_steps(count),
                BLOCK_M=block_m,
                BLOCK_N=block_l,
                BLOCK_K=block_c,
                BLOCK_E=_LEAVING,
                **options,
            )
        else:
            _rectangle_grad_kernel[(*grid, splits)](
                *operands,
                k,
                count,
                1 if way == "columns" else rows,
                lines,
                width,
                part,
                values.numel(),
                *strides,
                WAY=way,
                BLOCK_M=block_m,
                BLOCK_L=block_l,
                BLOCK_C=block_c,
                **options,
            )
        if splits > 1:
            torch.sum(parts, 0, out=values)
