"""The Triton kernels of 4-bit weights: W from its codes, and a product that unpacks them itself.

Symbols as in ``pyfastft/ops/ptq4.md``. Masks go over every edge, so any size works. Offsets into
matrices are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft.native._torch_int4 import Weight
from pyfastft.triton_kernels._common import OPTIONS
from pyfastft.triton_kernels._int4_engine import (
    DEQUANTIZE_TILE,
    Tiles,
    common_group,
    parts_of,
)


@triton.jit
def zeros_of(zero_ptr, places, mask):
    """Zero-points; 8 where there are none."""
    if zero_ptr is None:
        zero = tl.full(places.shape, 8.0, tl.float32)
    else:
        zero = tl.load(zero_ptr + places, mask=mask, other=0).to(tl.float32)
    return zero


@triton.jit(do_not_specialize=["first_column"])
def _int4_dequantize_kernel(
    weight_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    perm_ptr,
    table_ptr,
    N,
    K,
    first_column,
    columns,
    group_size,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMMON_GROUP: tl.constexpr,
):
    """Computes weight (N, columns) = scale * (c - zero), or scale * table[c], of the columns from
    first_column on; with perm column j of the codes goes to column perm[j].

    Tiling: a program owns a tile; where COMMON_GROUP its columns have one group of every row.
    Numerics: float32, difference and product each rounded, then one rounding to weight's dtype.
    Traffic: each once. Bound by writing weight.
    Relies on: first_column is even, and a multiple of BLOCK_K where COMMON_GROUP.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_panel = tl.program_id(1) * BLOCK_K
    first = tl.cast(first_column, tl.int64) + in_panel
    in_rows = (rows < N)[:, None]
    pairs = first // 2 + tl.arange(0, BLOCK_K // 2)
    end = tl.cast(first_column, tl.int64) + columns
    packed = tl.load(
        codes_ptr + rows[:, None] * ((K + 1) // 2) + pairs[None, :],
        mask=in_rows & (2 * pairs < end)[None, :],
        other=0,
    )
    codes = tl.interleave(packed & 15, packed >> 4)

    steps = tl.arange(0, BLOCK_K)
    inside = in_rows & (in_panel + steps < columns)[None, :]
    groups_of_row = tl.cdiv(K, group_size)
    if COMMON_GROUP:
        places = rows[:, None] * groups_of_row + first // group_size
        present = in_rows
    else:
        places = rows[:, None] * groups_of_row + ((first + steps) // group_size)[None, :]
        present = inside
    scale = tl.load(scale_ptr + places, mask=present, other=0.0).to(tl.float32)
    if table_ptr is None:
        values = codes.to(tl.float32) - zeros_of(zero_ptr, places, present)
    else:
        values = tl.load(table_ptr + codes)
    values *= scale
    target = in_panel + steps
    if perm_ptr is not None:
        target = tl.load(perm_ptr + target, mask=target < columns, other=-1)
        # Nobody else looks into perm: what is no column is left out, not written elsewhere.
        inside &= ((target >= 0) & (target < columns))[None, :]
    tl.store(
        weight_ptr + rows[:, None] * columns + target[None, :],
        values.to(weight_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit(do_not_specialize=["M"])
def _int4_product_kernel(
    y_ptr,
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    table_ptr,
    bias_ptr,
    M,
    N,
    K,
    part,
    group_size,
    x_stride_m,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Computes y^T = W x^T + bias over one part of K; WHOLE, where that is all of K, adds the bias.

    W is the left operand: tensor cores that take it from registers (wgmma) get it there without a
    round trip through shared memory, and no code is unpacked for two tiles of x in one program.

    Tiling: a program owns a tile of y; GROUP_M tiles of rows of y at a time, column by column, so
    that what runs at once finds x and codes in L2.
    Numerics: c - zero is exact in every dtype for integer zeros; a fractional zero or a table is
    rounded to x's dtype once. Products are summed in float32 and scaled once every BLOCK_K, in
    float32. Not WHOLE, y (splits, M, N) are float32 sums.
    Traffic: codes once per tile of rows of y, x once per tile of columns.
    Relies on: x has unit column stride; BLOCK_K divides group_size or that is at least K; part is a
    multiple of BLOCK_K.
    """
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    per_band = GROUP_M * tiles_n
    height = tl.minimum(tiles_m - pid // per_band * GROUP_M, GROUP_M)
    tile_m = pid // per_band * GROUP_M + pid % per_band % height
    tile_n = pid % per_band // height
    rows = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows, in_tokens = rows < N, tokens < M
    split = tl.program_id(1)
    begin = split * part
    end = tl.minimum(begin + part, K)

    depth, pairs = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2)
    codes_ptrs = codes_ptr + rows[:, None] * ((K + 1) // 2) + begin // 2 + pairs[None, :]
    x_ptrs = x_ptr + tokens[:, None] * x_stride_m + begin + depth[None, :]
    groups = rows * tl.cdiv(K, group_size)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(begin, end, BLOCK_K):
        packed = tl.load(
            codes_ptrs, mask=in_rows[:, None] & (2 * pairs < K - first)[None, :], other=0
        )
        x = tl.load(x_ptrs, mask=in_tokens[:, None] & (depth < K - first)[None, :], other=0.0)
        codes = tl.interleave(packed & 15, packed >> 4)
        places = groups + first // group_size
        if table_ptr is None:
            zero = zeros_of(zero_ptr, places, in_rows)
            weight = (codes.to(tl.float32) - zero[:, None]).to(x.dtype)
        else:
            weight = tl.load(table_ptr + codes).to(x.dtype)
        scale = tl.load(scale_ptr + places, mask=in_rows, other=0.0).to(tl.float32)
        acc += tl.dot(weight, tl.trans(x), input_precision="ieee") * scale[:, None]
        codes_ptrs += BLOCK_K // 2
        x_ptrs += BLOCK_K

    inside = in_rows[:, None] & in_tokens[None, :]
    if WHOLE:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        place = tokens[None, :] * N + rows[:, None]
        tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        place = (split.to(tl.int64) * M + tokens)[None, :] * N + rows[:, None]
        tl.store(y_ptr + place, acc, mask=inside)


@triton.jit(do_not_specialize=["size", "splits"])
def _int4_add_parts_kernel(y_ptr, parts_ptr, bias_ptr, N, size, splits, BLOCK: tl.constexpr):
    """Computes y (size) = the sum of parts (splits, size), first to last, + bias."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, splits):
        offset = tl.cast(i, tl.int64) * size
        acc += tl.load(parts_ptr + offset + index, mask=index < size, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + index % N, mask=index < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, acc.to(y_ptr.dtype.element_ty), mask=index < size)


# -- launchers -------------------------------------------------------------------------------------

# Tiles of rows of y that run at once: with as many of its columns beside them, a tile of either
# operand serves eight programs.
GROUP_M = 8
# One program of the sums: enough elements for every thread of 4 warps to load 16 bytes.
_SUM_BLOCK = 512


def weight_arguments(weight: Weight) -> dict[str, Any]:
    """What every kernel takes of a weight."""
    return {
        "codes_ptr": weight.codes,
        "scale_ptr": weight.scale,
        "zero_ptr": weight.zero,
        "table_ptr": weight.table,
        "N": weight.n,
        "K": weight.k,
        "group_size": weight.group_size,
    }


def dequantize(
    out: torch.Tensor, weight: Weight, *, first: int = 0, perm: torch.Tensor | None = None
) -> None:
    """out (N, columns) = the columns of W from ``first`` on; see ``Int4Kernels.dequantize``."""
    n, columns = out.shape
    common = common_group(weight.k, weight.group_size, first)
    block_k = min(common, DEQUANTIZE_TILE.block_k) if common else DEQUANTIZE_TILE.block_k
    grid = (triton.cdiv(n, DEQUANTIZE_TILE.block_n), triton.cdiv(columns, block_k))
    _int4_dequantize_kernel[grid](
        out,
        perm_ptr=perm,
        first_column=first,
        columns=columns,
        COMMON_GROUP=common > 0,
        BLOCK_N=DEQUANTIZE_TILE.block_n,
        BLOCK_K=block_k,
        num_warps=DEQUANTIZE_TILE.num_warps,
        num_stages=DEQUANTIZE_TILE.num_stages,
        # The bits are the reference's: nothing may be fused.
        **{**OPTIONS, "enable_fp_fusion": False},
        **weight_arguments(weight),
    )


def product(
    *,
    y: torch.Tensor,
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    tiles: Tiles,
    multiprocessors: int,
) -> None:
    """y = x W^T + b, for x with unit column stride and a group_size that ``tiles`` can take.

    Where the tiles of y do not fill the device K is cut into parts, whose float32 sums a second,
    small kernel adds up, first to last.
    """
    m, n = y.shape
    programs = triton.cdiv(m, tiles.block_m) * triton.cdiv(n, tiles.block_n)
    splits, part = parts_of(weight.k, tiles.block_k, programs, multiprocessors)
    parts = y if splits == 1 else y.new_empty((splits, m, n), dtype=torch.float32)
    _int4_product_kernel[(programs, splits)](
        parts,
        x,
        bias_ptr=bias,
        M=m,
        part=part,
        x_stride_m=x.stride(0),
        WHOLE=splits == 1,
        BLOCK_N=tiles.block_n,
        BLOCK_M=tiles.block_m,
        BLOCK_K=tiles.block_k,
        GROUP_M=GROUP_M,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **OPTIONS,
        **weight_arguments(weight),
    )
    if splits > 1:
        add_parts(y, parts, bias)


def add_parts(y: torch.Tensor, parts: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """y = the sum of parts, as many of y's shape, first to last, + bias."""
    splits, size = parts.shape[0], y.numel()
    _int4_add_parts_kernel[(triton.cdiv(size, _SUM_BLOCK),)](
        y, parts, bias, y.shape[-1], size, splits, BLOCK=_SUM_BLOCK, enable_fp_fusion=True
    )
