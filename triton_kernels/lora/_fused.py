"""The Triton kernels that hold the base product: G and G' of ``pyfastft/ops/lora.md``, and the
whole forward of a few tokens.

G and G' are one kernel: a product whose accumulator starts from the low-rank term. What it reads
beyond the product is that term's two thin factors, and nothing is written twice.

Masks go over every edge, so any size works. Offsets into matrices are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pyfastft._random import dropout_scale
from pyfastft.triton_kernels._common import DOT_TYPES, OPTIONS, device_of, dropout_keep
from pyfastft.triton_kernels._engine import FUSED_RANKS, Tiles
from pyfastft.triton_kernels.lora._stages import masking

# What changes from call to call: a kernel must not be compiled for these values.
_VARYING = ["M", "threshold"]


@triton.jit
def tile_of(pid, tiles_m, tiles_c, GROUP_M: tl.constexpr):
    """The tile of a program: GROUP_M rows of tiles at a time, column by column, so that what runs
    at once reads few tiles of either operand and finds them in L2."""
    per_group = GROUP_M * tiles_c
    first = pid // per_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % per_group % height, pid % per_group // height


@triton.jit
def _add_low_rank(acc, u, v, DOT: tl.constexpr, PIECES: tl.constexpr):
    """acc + u v, on tensor cores also where the factors are float32 beside a half base (PIECES).

    There each is a sum of two bfloat16 pieces, which keep 16 of its 24 bits; of the four products
    the smallest is left out. The result is rounded to at most 11 bits.
    """
    if PIECES:
        u_high, v_high = u.to(tl.bfloat16), v.to(tl.bfloat16)
        u_low = (u - u_high.to(tl.float32)).to(tl.bfloat16)
        v_low = (v - v_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(u_low, v_high, acc)
        acc = tl.dot(u_high, v_low, acc)
        acc = tl.dot(u_high, v_high, acc)
    else:
        acc = tl.dot(u.to(DOT), v, acc, input_precision="ieee")
    return acc


@triton.jit
def low_rank_tile(
    u_ptr,
    v_ptr,
    scaling_ptr,
    rng_ptr,
    rows,
    first_column,
    M,
    C,
    R,
    v_stride_r,
    v_stride_c,
    threshold,
    scale,
    DOT: tl.constexpr,
    PIECES: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of s * scale * select(u v), the mask that of the elements of a matrix (M, C): where
    the sums of a product may start. u (M, R) is contiguous."""
    columns = first_column + tl.arange(0, BLOCK_C).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    # Short: not worth the memory of a pipeline.
    for first_rank in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = first_rank + tl.arange(0, BLOCK_R).to(tl.int64)
        u = tl.load(
            u_ptr + rows[:, None] * R + ranks[None, :],
            mask=(rows < M)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + ranks[:, None] * v_stride_r + columns[None, :] * v_stride_c,
            mask=(ranks < R)[:, None] & (columns < C)[None, :],
            other=0.0,
        )
        acc = _add_low_rank(acc, u, v, DOT, PIECES)
    if DROPOUT:
        keep = dropout_keep(rng_ptr, rows, first_column, C, threshold, BLOCK_C, GROUPED)
        acc = tl.where(keep, acc, 0.0)
    return acc * (tl.load(scaling_ptr) * scale)


@triton.jit(do_not_specialize=_VARYING)
def _lora_gemm_kernel(
    out_ptr,
    a,
    w,
    bias_ptr,
    u_ptr,
    v_ptr,
    scaling_ptr,
    rng_ptr,
    M,
    C,
    D,
    R,
    a_stride_m,
    w_stride_d,
    w_stride_c,
    v_stride_r,
    v_stride_c,
    threshold,
    scale,
    DOT: tl.constexpr,
    PIECES: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
):
    """Computes out (M, C) = a w + bias + s * scale * select(u v), the mask that of out's elements.

    Tiling: a program owns a tile of out; it loops over the rank, then over D.
    Numerics: u is rounded to DOT, or cut into PIECES; the low-rank sum is masked and scaled in
    float32 before the product is added to it; one rounding to out's dtype.
    Traffic: a, w, u and v as their tiles demand; out is written once.
    Relies on: a has unit column stride; u (M, R) and out are contiguous. With TMA a and w are
    descriptors, w's of the (C, D) matrix where it is W_TRANSPOSED; else they are pointers.
    """
    tile_m, tile_c = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tile_c * BLOCK_C
    columns = first_column + tl.arange(0, BLOCK_C).to(tl.int64)
    in_rows, in_columns = (rows < M)[:, None], (columns < C)[None, :]

    acc = low_rank_tile(
        u_ptr,
        v_ptr,
        scaling_ptr,
        rng_ptr,
        rows,
        first_column,
        M,
        C,
        R,
        v_stride_r,
        v_stride_c,
        threshold,
        scale,
        DOT,
        PIECES,
        DROPOUT,
        GROUPED,
        BLOCK_M,
        BLOCK_C,
        BLOCK_R,
    )
    if TMA:
        for first in range(0, D, BLOCK_D):
            a_tile = a.load([tile_m * BLOCK_M, first])
            if W_TRANSPOSED:
                w_tile = w.load([first_column, first]).T
            else:
                w_tile = w.load([first, first_column])
            acc = tl.dot(a_tile, w_tile, acc, input_precision="ieee")
    else:
        depth = tl.arange(0, BLOCK_D)
        a_ptrs = a + rows[:, None] * a_stride_m + depth[None, :]
        w_ptrs = w + depth[:, None].to(tl.int64) * w_stride_d + columns[None, :] * w_stride_c
        for first in range(0, D, BLOCK_D):
            in_depth = depth < D - first
            a_tile = tl.load(a_ptrs, mask=in_rows & in_depth[None, :], other=0.0)
            w_tile = tl.load(w_ptrs, mask=in_depth[:, None] & in_columns, other=0.0)
            acc = tl.dot(a_tile, w_tile, acc, input_precision="ieee")
            a_ptrs += BLOCK_D
            w_ptrs += tl.cast(w_stride_d, tl.int64) * BLOCK_D

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * C + columns[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=in_rows & in_columns,
    )


@triton.jit
def _finish(
    y_ptr,
    xa_ptr,
    product,
    s,
    lora_b_ptr,
    bias_ptr,
    gate_ptr,
    scaling_ptr,
    rows,
    columns,
    M,
    N,
    R,
    gate_stride_m,
    DOT: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of y = product + bias + scaling * (s * gate) B^T, where s (rows, R) is rounded to DOT
    first; the program of the first column tile stores it as xa."""
    ranks = tl.arange(0, BLOCK_R)
    thin = (rows < M)[:, None] & (ranks < R)[None, :]
    u = s.to(DOT)
    if tl.program_id(0) == 0:
        tl.store(xa_ptr + rows[:, None] * R + ranks[None, :], u, mask=thin)
    if gate_ptr is not None:
        gate = tl.load(
            gate_ptr + rows[:, None] * gate_stride_m + ranks[None, :], mask=thin, other=0.0
        )
        u = (u.to(tl.float32) * gate.to(tl.float32)).to(DOT)
    b = tl.load(
        lora_b_ptr + columns[None, :] * R + ranks[:, None],
        mask=(ranks < R)[:, None] & (columns < N)[None, :],
        other=0.0,
    )
    low_rank = _add_low_rank(tl.zeros_like(product), u, b, DOT, PIECES)
    acc = product + low_rank * tl.load(scaling_ptr)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + rows[:, None] * N + columns[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (columns < N)[None, :],
    )


@triton.jit(do_not_specialize=["M"])
def _lora_decode_kernel(
    y_ptr,
    xa_ptr,
    x_ptr,
    w_ptr,
    lora_a_ptr,
    lora_b_ptr,
    bias_ptr,
    gate_ptr,
    scaling_ptr,
    M,
    N,
    K,
    R,
    part,
    x_stride_m,
    w_stride_n,
    w_stride_k,
    gate_stride_m,
    DOT: tl.constexpr,
    PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes x W^T and x A^T over one part of K; WHOLE, where that is all of K, finishes y.

    Tiling: a program owns all rows, a column tile of y and a part of K. Every column tile computes
    x A^T again: A comes from L2, and R is small against the columns of W that it stands beside.
    Numerics: float32 sums; not WHOLE, y (splits, M, N) and xa (splits, M, R) are such sums.
    Traffic: W once; x and A once per column tile, of which all but the first are found in L2.
    Relies on: x has unit column stride; A, B, y and xa are contiguous; part is a multiple of
    BLOCK_D; one tile of rows and one of ranks hold everything.
    """
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    begin = split * part
    end = tl.minimum(begin + part, K)

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(begin, end, BLOCK_D):
        depth = first + tl.arange(0, BLOCK_D).to(tl.int64)
        x = tl.load(
            x_ptr + rows[:, None] * x_stride_m + depth[None, :],
            mask=(rows < M)[:, None] & (depth < K)[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + depth[:, None] * w_stride_k + columns[None, :] * w_stride_n,
            mask=(depth < K)[:, None] & (columns < N)[None, :],
            other=0.0,
        )
        a = tl.load(
            lora_a_ptr + depth[:, None] + ranks[None, :].to(tl.int64) * K,
            mask=(depth < K)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision="ieee")
        s = tl.dot(x.to(DOT), a, s, input_precision="ieee")

    if WHOLE:
        _finish(
            y_ptr,
            xa_ptr,
            acc,
            s,
            lora_b_ptr,
            bias_ptr,
            gate_ptr,
            scaling_ptr,
            rows,
            columns,
            M,
            N,
            R,
            gate_stride_m,
            DOT,
            PIECES,
            BLOCK_R,
        )
    else:
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(
            y_ptr + (split.to(tl.int64) * M + rows)[:, None] * N + columns[None, :],
            acc,
            mask=inside,
        )
        if tl.program_id(0) == 0:
            thin = (rows < M)[:, None] & (ranks < R)[None, :]
            tl.store(
                xa_ptr + (split.to(tl.int64) * M + rows)[:, None] * R + ranks[None, :], s, mask=thin
            )


@triton.jit(do_not_specialize=["M", "splits"])
def _lora_decode_sum_kernel(
    y_ptr,
    xa_ptr,
    y_parts_ptr,
    xa_parts_ptr,
    lora_b_ptr,
    bias_ptr,
    gate_ptr,
    scaling_ptr,
    M,
    N,
    R,
    splits,
    gate_stride_m,
    DOT: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Finishes y from the parts of :func:`_lora_decode_kernel`, added first to last."""
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    thin = (rows < M)[:, None] & (ranks < R)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for split in range(0, splits):
        row = (tl.cast(split, tl.int64) * M + rows)[:, None]
        acc += tl.load(y_parts_ptr + row * N + columns[None, :], mask=inside, other=0.0)
        s += tl.load(xa_parts_ptr + row * R + ranks[None, :], mask=thin, other=0.0)
    _finish(
        y_ptr,
        xa_ptr,
        acc,
        s,
        lora_b_ptr,
        bias_ptr,
        gate_ptr,
        scaling_ptr,
        rows,
        columns,
        M,
        N,
        R,
        gate_stride_m,
        DOT,
        PIECES,
        BLOCK_R,
    )


# -- launchers -------------------------------------------------------------------------------------

# Rows of tiles that run at once: with as many columns beside them, a tile of either operand serves
# eight programs.
_GROUP_M = 8


def low_rank_types(base: torch.Tensor, adapter: torch.Tensor) -> dict[str, Any]:
    """What the low-rank term beside a base of that dtype is multiplied in."""
    mixed = adapter.dtype is torch.float32 and base.dtype is not torch.float32
    return {"DOT": DOT_TYPES[adapter.dtype], "PIECES": mixed}


def _meta(tiles: Tiles, base: torch.Tensor, adapter: torch.Tensor, block_r: int) -> dict[str, Any]:
    """What every kernel is compiled for, and how it is launched."""
    return {
        **low_rank_types(base, adapter),
        "BLOCK_M": tiles.block_m,
        "BLOCK_C": tiles.block_c,
        "BLOCK_R": block_r,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **OPTIONS,
    }


def _gemm(
    out: torch.Tensor,
    a: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scaling: torch.Tensor,
    tiles: Tiles,
    bias: torch.Tensor | None = None,
    rng: torch.Tensor | None = None,
    threshold: int = 0,
) -> None:
    """out (M, C) = a w + bias + s dropout(u v), for w (D, C) and v (R, C) of any strides."""
    (m, c), d, r = out.shape, w.shape[0], v.shape[0]
    block_r = next((block for block in FUSED_RANKS if block >= r), FUSED_RANKS[-1])
    transposed = w.stride(0) == 1
    a_operand, w_operand = a, w
    if tiles.tma:
        rows_of_w = w.T if transposed else w
        block = [tiles.block_c, tiles.block_d] if transposed else [tiles.block_d, tiles.block_c]
        a_operand = TensorDescriptor.from_tensor(a, [tiles.block_m, tiles.block_d])
        w_operand = TensorDescriptor.from_tensor(rows_of_w, block)
    _lora_gemm_kernel[(triton.cdiv(m, tiles.block_m) * triton.cdiv(c, tiles.block_c),)](
        out,
        a_operand,
        w_operand,
        bias,
        u,
        v,
        scaling,
        M=m,
        C=c,
        D=d,
        R=r,
        a_stride_m=a.stride(0),
        w_stride_d=w.stride(0),
        w_stride_c=w.stride(1),
        v_stride_r=v.stride(0),
        v_stride_c=v.stride(1),
        scale=dropout_scale(threshold),
        BLOCK_D=tiles.block_d,
        GROUP_M=_GROUP_M,
        TMA=tiles.tma,
        W_TRANSPOSED=transposed,
        **masking(c, rng, threshold),
        **_meta(tiles, a, v, block_r),
    )


def base_up(
    *,
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    u: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    tiles: Tiles,
) -> None:
    """G: y = x W^T + b + s u B^T. Operands as a stage's; W has any strides, b is contiguous."""
    _gemm(y, x, weight.T, u, lora_b.T, scaling, tiles, bias=bias)


def base_dx(
    *,
    dx: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    t: torch.Tensor,
    lora_a: torch.Tensor,
    scaling: torch.Tensor,
    rng: torch.Tensor | None,
    threshold: int,
    tiles: Tiles,
) -> None:
    """G': dX = dY W + s dropout(t A). Operands as a stage's; W has any strides."""
    _gemm(dx, grad, weight, t, lora_a, scaling, tiles, rng=rng, threshold=threshold)


def decode(
    *,
    y: torch.Tensor,
    xa: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    scaling: torch.Tensor,
    tiles: Tiles,
) -> None:
    """xa = x A^T and y = x W^T + b + s (xa * gate) B^T, for the rows and ranks of a tile each.

    One kernel where the column tiles fill the device; elsewhere K is cut into parts, whose float32
    sums a second, small kernel adds up. Operands as a stage's; W has any strides, the gate is
    (1, R) or (M, R) with unit column stride.
    """
    (m, n), (r, k) = y.shape, lora_a.shape
    columns = triton.cdiv(n, tiles.block_c)
    depth = triton.cdiv(k, tiles.block_d)
    # Half a device of programs keeps the memory busy; two launches in place of one do not.
    multiprocessors = device_of(x).multiprocessors
    splits = 1 if 2 * columns >= multiprocessors else min(multiprocessors // columns, depth)
    part = triton.cdiv(depth, splits) * tiles.block_d
    splits = triton.cdiv(k, part)
    whole = splits == 1
    meta = _meta(tiles, x, lora_a, max(16, triton.next_power_of_2(r)))
    finish = {
        "lora_b_ptr": lora_b,
        "bias_ptr": bias,
        "gate_ptr": gate,
        "scaling_ptr": scaling,
        "gate_stride_m": 0 if gate is None or gate.shape[0] == 1 else gate.stride(0),
    }
    y_parts = y if whole else y.new_empty((splits, m, n), dtype=torch.float32)
    xa_parts = xa if whole else xa.new_empty((splits, m, r), dtype=torch.float32)
    _lora_decode_kernel[(columns, splits)](
        y_parts,
        xa_parts,
        x,
        weight,
        lora_a,
        M=m,
        N=n,
        K=k,
        R=r,
        part=part,
        x_stride_m=x.stride(0),
        w_stride_n=weight.stride(0),
        w_stride_k=weight.stride(1),
        WHOLE=whole,
        BLOCK_D=tiles.block_d,
        **finish,
        **meta,
    )
    if not whole:
        _lora_decode_sum_kernel[(columns,)](
            y, xa, y_parts, xa_parts, M=m, N=n, R=r, splits=splits, **finish, **meta
        )
