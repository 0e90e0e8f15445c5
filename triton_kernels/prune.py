"""block_sparse_linear on Triton: products over the blocks that there are.

Symbols as in ``pyfastft/ops/prune.md``. A program of the forward, or of dX, computes a tile of
tokens for one row, or column, of the grid of blocks, and goes through its blocks; those with the
most begin first, so that none is left to run alone at the end. dX reads the same values through
the transposed index: no transposed copy is made. dvalues has a program for every tile of a block,
over one part of the tokens; the parts are added up in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft._op import implement
from pyfastft.ops.prune._pattern import expect_index, grid_of, parts_of
from pyfastft.triton_kernels import _plan
from pyfastft.triton_kernels._common import OPTIONS, device_of, why_no_triton

# What a block may be: tensor cores take no side below 16, and tiles are cut in halves.
EDGES = (16, 32, 64, 128)
_NARROWEST = 16


@dataclass(frozen=True)
class Tile:
    """Tokens, lines and depth of a tile, and how its program is compiled."""

    tokens: int
    lines: int
    depth: int
    num_warps: int
    num_stages: int


# (half, aligned) -> (tokens, lines, depth, num_warps, num_stages) at most; a tile is no larger than
# a block. Few tokens take the smallest tile that holds them: the blocks are then read at the
# memory's rate, and more of them in flight. Where a block's tokens begin is read in the loop, and
# half of the stages is between that and the tokens. Sizes that Triton cannot align take an address
# for each element, and float32 holds its operands in registers: larger tiles spill.
_PRODUCT = {
    (True, True): (128, 128, 64, 8, 5),
    (True, False): (64, 64, 32, 8, 5),
    (False, True): (32, 32, 16, 4, 3),
    (False, False): (32, 32, 16, 4, 3),
}
# half -> the same; depth is a block's columns.
_GRADIENT = {True: (64, 64, 128, 8, 3), False: (32, 32, 32, 4, 2)}


def product_tile(m: int, line_edge: int, depth_edge: int, *, half: bool, aligned: bool) -> Tile:
    """For y and dX: a tile of so many tokens at most, within one row of blocks."""
    tokens, lines, depth, num_warps, num_stages = _PRODUCT[half, aligned]
    tokens = min(tokens, max(_NARROWEST, triton.next_power_of_2(m)))
    lines, depth = min(lines, line_edge), min(depth, depth_edge)
    if aligned and tokens * lines <= 64 * 64:
        num_warps = 4
    return Tile(tokens, lines, depth, num_warps, num_stages)


def gradient_tile(rows: int, columns: int, *, half: bool) -> Tile:
    """For dvalues: lines are a block's rows, depth its columns."""
    tokens, lines, depth, num_warps, num_stages = _GRADIENT[half]
    lines, depth = min(lines, rows), min(depth, columns)
    if lines * depth <= 32 * 32:
        num_warps = 4
    return Tile(tokens, lines, depth, num_warps, num_stages)


@triton.jit
def _block_product_kernel(
    c_ptr,
    x_ptr,
    values_ptr,
    bias_ptr,
    offsets_ptr,
    places_ptr,
    blocks_ptr,
    order_ptr,
    M,
    lines,
    depth,
    x_stride_m,
    x_stride_d,
    block_stride_l,
    block_stride_d,
    EDGE_L: tl.constexpr,
    EDGE_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes c = x W^T + b at a tile of tokens and of the lines of one row of the grid.

    Lines are W's rows and depth its columns, or for dX the other way round. ``blocks_ptr`` says
    which block stands at an entry; None, an entry is its own.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    within = tl.program_id(1) % (EDGE_L // BLOCK_L) * BLOCK_L + tl.arange(0, BLOCK_L)
    group = tl.load(order_ptr + tl.program_id(1) // (EDGE_L // BLOCK_L))
    begin = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    STEPS: tl.constexpr = EDGE_D // BLOCK_D
    x_rows = x_ptr + tokens[:, None] * x_stride_m
    acc = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    for step in range(0, (end - begin) * STEPS):
        entry = begin + step // STEPS
        at = step % STEPS * BLOCK_D + tl.arange(0, BLOCK_D)
        column = tl.load(places_ptr + entry).to(tl.int64) * EDGE_D + at
        block = entry if blocks_ptr is None else tl.load(blocks_ptr + entry)
        there = column < depth
        x = tl.load(
            x_rows + column[None, :] * x_stride_d,
            mask=(tokens < M)[:, None] & there[None, :],
            other=0.0,
        )
        # What of a block lies beyond W may hold anything.
        w = tl.load(
            values_ptr
            + block.to(tl.int64) * (EDGE_L * EDGE_D)
            + at[:, None] * block_stride_d
            + within[None, :] * block_stride_l,
            mask=there[:, None],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision="ieee")
    line = group.to(tl.int64) * EDGE_L + within
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + line, mask=line < lines, other=0.0).to(tl.float32)[None, :]
    mask = (tokens < M)[:, None] & (line < lines)[None, :]
    tl.store(c_ptr + tokens[:, None] * lines + line[None, :], acc, mask=mask)


@triton.jit
def _block_grad_kernel(
    dvalues_ptr,
    grad_ptr,
    x_ptr,
    rows_ptr,
    places_ptr,
    columns_ptr,
    M,
    N,
    K,
    part,
    total,
    grad_stride_m,
    grad_stride_n,
    x_stride_m,
    x_stride_k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes grad^T x at a tile of one block, over one part of the tokens; 0 beyond W."""
    ACROSS: tl.constexpr = COLUMNS // BLOCK_D
    tile = tl.program_id(1)
    within_rows = tile // ACROSS * BLOCK_L + tl.arange(0, BLOCK_L)
    within_columns = tile % ACROSS * BLOCK_D + tl.arange(0, BLOCK_D)
    # Entries of columns know their row and their block, and a block knows its column.
    block = tl.load(places_ptr + tl.program_id(0)).to(tl.int64)
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64) * ROWS + within_rows
    column = tl.load(columns_ptr + block).to(tl.int64) * COLUMNS + within_columns
    split = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for first in range(split * part, tl.minimum(split * part + part, M), BLOCK_M):
        tokens = first + tl.arange(0, BLOCK_M)
        dy = tl.load(
            grad_ptr + tokens[:, None] * grad_stride_m + row[None, :] * grad_stride_n,
            mask=(tokens < M)[:, None] & (row < N)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + tokens[:, None] * x_stride_m + column[None, :] * x_stride_k,
            mask=(tokens < M)[:, None] & (column < K)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
    acc = tl.where((row < N)[:, None] & (column < K)[None, :], acc, 0.0)
    to = dvalues_ptr + split * total + block * (ROWS * COLUMNS)
    tl.store(to + within_rows[:, None] * COLUMNS + within_columns[None, :], acc)


# -- launchers -------------------------------------------------------------------------------------


def _why_not(lead: torch.Tensor, values: torch.Tensor) -> str | None:
    rows, columns = values.shape[1:]
    if rows not in EDGES or columns not in EDGES:
        return f"blocks of {rows} x {columns}: edges are {', '.join(map(str, EDGES))}"
    return why_no_triton(lead)


def _forward_unsupported(x: torch.Tensor, values: torch.Tensor, *_: Any) -> str | None:
    return _why_not(x, values)


def _backward_unsupported(
    grad: torch.Tensor, x: torch.Tensor | None, values: torch.Tensor, *_: Any
) -> str | None:
    return _why_not(grad, values)


def product(
    c: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor,
    grid: tuple[int, int],
    *,
    transposed: bool,
) -> None:
    """c (M, lines) = x (M, depth) W^T + b, or for dX x W."""
    m, lines = c.shape
    if not c.numel():
        return
    parts, (rows, columns) = parts_of(index, *grid), values.shape[1:]
    if transposed:
        lists = (parts.column_offsets, parts.row_indices, parts.places, parts.column_order)
        groups, line_edge, depth_edge, strides = grid[1], columns, rows, (1, columns)
    else:
        lists = (parts.row_offsets, parts.column_indices, None, parts.row_order)
        groups, line_edge, depth_edge, strides = grid[0], rows, columns, (columns, 1)
    half, aligned = x.dtype is not torch.float32, lines % 16 == 0 and x.shape[1] % 16 == 0
    tile = product_tile(m, line_edge, depth_edge, half=half, aligned=aligned)
    with torch.cuda.device_of(x):
        _block_product_kernel[(triton.cdiv(m, tile.tokens), groups * (line_edge // tile.lines))](
            c,
            x,
            values,
            bias,
            *lists,
            m,
            lines,
            x.shape[1],
            *x.stride(),
            *strides,
            EDGE_L=line_edge,
            EDGE_D=depth_edge,
            BLOCK_M=tile.tokens,
            BLOCK_L=tile.lines,
            BLOCK_D=tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **OPTIONS,
        )


def gradient(
    dvalues: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    grid: tuple[int, int],
) -> None:
    """dvalues (blocks, rows, columns) = the blocks of grad^T x."""
    (blocks, rows, columns), (m, n), k = dvalues.shape, grad.shape, x.shape[1]
    if not dvalues.numel():
        return
    parts = parts_of(index, *grid)
    tile = gradient_tile(rows, columns, half=x.dtype is not torch.float32)
    tiles = (rows // tile.lines) * (columns // tile.depth)
    splits, part = _plan.parts_of(max(m, 1), tile.tokens, blocks * tiles, device_of(grad))
    sums = dvalues
    if splits > 1:
        sums = dvalues.new_empty((splits, *dvalues.shape), dtype=torch.float32)
    with torch.cuda.device_of(grad):
        _block_grad_kernel[(blocks, tiles, splits)](
            sums,
            grad,
            x,
            parts.row_indices,
            parts.places,
            parts.column_indices,
            m,
            n,
            k,
            part,
            dvalues.numel(),
            *grad.stride(),
            *x.stride(),
            ROWS=rows,
            COLUMNS=columns,
            BLOCK_M=tile.tokens,
            BLOCK_L=tile.lines,
            BLOCK_D=tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **OPTIONS,
        )
    if splits > 1:
        dvalues.copy_(sums.sum(0))


@implement("block_sparse_linear", "triton", unsupported=_forward_unsupported)
def block_sparse_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor,
    n: int,
) -> None:
    m, k = x.shape[:-1].numel(), x.shape[-1]
    grid = grid_of(n, k, *values.shape[1:])
    expect_index("block_sparse_linear", index, grid)
    x, values, index = x.reshape(m, k), values.contiguous(), index.contiguous()
    bias = None if bias is None else bias.contiguous()
    product(y.view(m, n), x, values, bias, index, grid, transposed=False)


@implement("block_sparse_linear_backward", "triton", unsupported=_backward_unsupported)
def block_sparse_linear_backward(
    dx: torch.Tensor,
    dvalues: torch.Tensor,
    dbias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    values: torch.Tensor,
    index: torch.Tensor,
    k: int,
    need: Sequence[bool],
) -> None:
    m, n = grad.shape[:-1].numel(), grad.shape[-1]
    grid = grid_of(n, k, *values.shape[1:])
    expect_index("block_sparse_linear_backward", index, grid)
    grad, index = grad.reshape(m, n), index.contiguous()
    if need[0]:
        product(dx.view(m, k), grad, values.contiguous(), None, index, grid, transposed=True)
    if need[1]:
        assert x is not None
        gradient(dvalues, grad, x.reshape(m, k), index, grid)
    if need[2]:
        dbias.copy_(grad.sum(0))
