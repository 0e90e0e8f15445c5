"""The Triton kernel of dX = dY W for a 4-bit W, which unpacks the codes itself.

Symbols as in ``pyfastft/ops/ptq4.md``. Masks go over every edge, so any size works. Offsets into
matrices are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft._random import dropout_scale
from pyfastft.native._torch_int4 import LowRank, Weight
from pyfastft.triton_kernels._common import OPTIONS
from pyfastft.triton_kernels._int4_engine import Tiles, parts_of
from pyfastft.triton_kernels.lora._fused import low_rank_tile, low_rank_types, tile_of
from pyfastft.triton_kernels.lora._stages import masking
from pyfastft.triton_kernels.ptq4._kernels import GROUP_M, add_parts, weight_arguments, zeros_of


@triton.jit(do_not_specialize=["M", "threshold"])
def _int4_gradient_kernel(
    dx_ptr,
    grad_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    table_ptr,
    t_ptr,
    lora_a_ptr,
    scaling_ptr,
    rng_ptr,
    M,
    N,
    K,
    R,
    part,
    group_size,
    grad_stride_m,
    threshold,
    keep_scale,
    DOT: tl.constexpr,
    PIECES: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    SCALE_IN_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Computes dX = dY W + s dropout(t A) over one part of N, its columns in the order of the
    codes; the low-rank term, where there is one, belongs to the first part.

    The columns of a tile of W have one scale in every row, which is multiplied into dY: W itself
    stays c - zero. dY is the left operand, which tensor cores may take from registers.

    Tiling: a program owns a tile of dX; GROUP_M tiles of rows at a time, column by column, so that
    what runs at once finds dY and codes in L2.
    Numerics: c - zero is exact in every dtype for integer zeros; a fractional zero or a table is
    rounded to dY's dtype once, and so is dY times the scale. Without SCALE_IN_GRAD, for a dtype
    whose range that product might leave, W is scaled and rounded. Products are summed in float32.
    Traffic: codes once per tile of rows of dX, dY once per tile of columns.
    Relies on: dY has unit column stride; BLOCK_K divides group_size or that is at least K; part is
    a multiple of BLOCK_N; t, A and dX, (M, K) or of float32 (parts, M, K), are contiguous.
    """
    tile_m, tile_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tile_k * BLOCK_K
    split = tl.program_id(1)
    begin = split * part
    end = tl.minimum(begin + part, N)

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if t_ptr is not None and split == 0:
        acc = low_rank_tile(
            t_ptr,
            lora_a_ptr,
            scaling_ptr,
            rng_ptr,
            rows,
            first_column,
            M,
            K,
            R,
            K,
            1,
            threshold,
            keep_scale,
            DOT,
            PIECES,
            DROPOUT,
            GROUPED,
            BLOCK_M,
            BLOCK_K,
            BLOCK_R,
        )

    in_rows = (rows < M)[:, None]
    depth = tl.arange(0, BLOCK_N)
    pairs = first_column // 2 + tl.arange(0, BLOCK_K // 2)
    in_pairs = (2 * pairs < K)[None, :]
    deep = begin + depth.to(tl.int64)
    grad_ptrs = grad_ptr + rows[:, None] * grad_stride_m + deep[None, :]
    codes_ptrs = codes_ptr + deep[:, None] * ((K + 1) // 2) + pairs[None, :]
    groups_of_row = tl.cdiv(K, group_size)
    places = deep * groups_of_row + first_column // group_size
    for first in range(begin, end, BLOCK_N):
        inside = depth < N - first
        packed = tl.load(codes_ptrs, mask=inside[:, None] & in_pairs, other=0)
        grad = tl.load(grad_ptrs, mask=in_rows & inside[None, :], other=0.0)
        scale = tl.load(scale_ptr + places, mask=inside, other=0.0).to(tl.float32)
        codes = tl.interleave(packed & 15, packed >> 4)
        if table_ptr is None:
            zero = zeros_of(zero_ptr, places, inside)
            weight = codes.to(tl.float32) - zero[:, None]
        else:
            weight = tl.load(table_ptr + codes)
        if SCALE_IN_GRAD:
            scaled = (grad.to(tl.float32) * scale[None, :]).to(grad.dtype)
        else:
            weight *= scale[:, None]
            scaled = grad
        acc = tl.dot(scaled, weight.to(grad.dtype), acc, input_precision="ieee")
        grad_ptrs += BLOCK_N
        codes_ptrs += tl.cast(BLOCK_N, tl.int64) * ((K + 1) // 2)
        places += tl.cast(BLOCK_N, tl.int64) * groups_of_row

    columns = first_column + tl.arange(0, BLOCK_K)
    tl.store(
        dx_ptr + (split.to(tl.int64) * M + rows)[:, None] * K + columns[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=in_rows & (columns < K)[None, :],
    )


# -- launcher --------------------------------------------------------------------------------------

# Ranks are multiplied so many at a time: as many as do not spill beside a tile's sums.
_BLOCK_R = 16


def input_gradient(
    *,
    dx: torch.Tensor,
    grad: torch.Tensor,
    weight: Weight,
    low_rank: LowRank | None,
    tiles: Tiles,
    multiprocessors: int,
) -> None:
    """dx = grad W + s dropout(t A), its columns in the order of the codes, for grad with unit
    column stride and a group_size that ``tiles`` can take.

    Where the tiles of dx do not fill the device N is cut into parts, whose float32 sums a second,
    small kernel adds up, first to last.
    """
    m, k = dx.shape
    programs = triton.cdiv(m, tiles.block_m) * triton.cdiv(k, tiles.block_k)
    splits, part = parts_of(weight.n, tiles.block_n, programs, multiprocessors)
    parts = dx if splits == 1 else dx.new_empty((splits, m, k), dtype=torch.float32)
    _int4_gradient_kernel[(programs, splits)](
        parts,
        grad,
        M=m,
        part=part,
        grad_stride_m=grad.stride(0),
        SCALE_IN_GRAD=grad.dtype is not torch.float16,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        BLOCK_R=_BLOCK_R,
        GROUP_M=GROUP_M,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **_low_rank_arguments(grad, k, low_rank),
        **OPTIONS,
        **weight_arguments(weight),
    )
    if splits > 1:
        add_parts(dx, parts)


def _low_rank_arguments(grad: torch.Tensor, k: int, term: LowRank | None) -> dict[str, Any]:
    if term is None:
        absent = dict.fromkeys(("t_ptr", "lora_a_ptr", "scaling_ptr"))
        types = low_rank_types(grad, grad)
        return {**absent, **masking(k, None, 0), **types, "R": 0, "keep_scale": 1.0}
    return {
        "t_ptr": term.t,
        "lora_a_ptr": term.lora_a,
        "scaling_ptr": term.scaling,
        "R": term.lora_a.shape[0],
        "keep_scale": dropout_scale(term.threshold),
        **masking(k, term.rng, term.threshold),
        **low_rank_types(grad, term.lora_a),
    }
