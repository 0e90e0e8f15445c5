"""abs_row_sums and its sub-gradient on Triton: tiles of U V^T - W are made and thrown away.

Symbols as in ``pyfastft/ops/lora.md``. Masks go over every edge, so any size works; a rank below 16
is padded by masked loads. Offsets into matrices are 64-bit, sums float32 in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft._op import implement
from pyfastft.triton_kernels._common import DOT_TYPES, OPTIONS, device_of, why_no_triton
from pyfastft.triton_kernels._plan import SUMS_TILES, Device, Tile, parts_of, tile_of
from pyfastft.triton_kernels.lora._stages import sum_parts


@triton.jit
def _difference(
    u_ptr,
    v_ptr,
    w_ptr,
    rows,
    columns,
    N,
    K,
    R,
    u_stride_n,
    u_stride_r,
    v_stride_k,
    v_stride_r,
    w_stride_n,
    w_stride_k,
    WITH_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of U V^T - W in float32, never rounded; 0 outside."""
    z = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first_rank in range(0, R, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R).to(tl.int64)
        u = tl.load(
            u_ptr + rows[:, None] * u_stride_n + ranks[None, :] * u_stride_r,
            mask=(rows < N)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + ranks[:, None] * v_stride_r + columns[None, :] * v_stride_k,
            mask=(ranks < R)[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        z = tl.dot(u, v, z, input_precision="ieee")
    if WITH_W:
        w = tl.load(
            w_ptr + rows[:, None] * w_stride_n + columns[None, :] * w_stride_k,
            mask=(rows < N)[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        z -= w.to(tl.float32)
    return z


@triton.jit
def _abs_row_sums_kernel(
    parts_ptr,
    u_ptr,
    v_ptr,
    w_ptr,
    N,
    K,
    R,
    part,
    u_stride_n,
    u_stride_r,
    v_stride_k,
    v_stride_r,
    w_stride_n,
    w_stride_k,
    DOT: tl.constexpr,
    WITH_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes parts (splits, N) = sum_k |U V^T - W| over one part of the columns each.

    Tiling: a program owns a row tile and a part, and loops over the part's columns.
    Numerics: dot products of u's dtype, the rest float32; every column of the tile has its own sum.
    Traffic: W once; V once per row tile, from L2. Relies on: part is a multiple of BLOCK_K.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    begin = split * part
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(begin, tl.minimum(begin + part, K), BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K).to(tl.int64)
        z = _difference(
            u_ptr,
            v_ptr,
            w_ptr,
            rows,
            columns,
            N,
            K,
            R,
            u_stride_n,
            u_stride_r,
            v_stride_k,
            v_stride_r,
            w_stride_n,
            w_stride_k,
            WITH_W,
            BLOCK_N,
            BLOCK_K,
            BLOCK_R,
        )
        sums += tl.abs(z)
    tl.store(parts_ptr + split.to(tl.int64) * N + rows, tl.sum(sums, axis=1), mask=rows < N)


@triton.jit
def _abs_row_sums_backward_kernel(
    parts_ptr,
    dw_ptr,
    grad_ptr,
    u_ptr,
    v_ptr,
    w_ptr,
    N,
    K,
    R,
    part,
    u_stride_n,
    u_stride_r,
    v_stride_k,
    v_stride_r,
    w_stride_n,
    w_stride_k,
    DOT: tl.constexpr,
    WITH_W: tl.constexpr,
    NEED_W: tl.constexpr,
    GRAD_OF_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes parts (splits, N, R) of du = (sign(U V^T - W) * grad) V over one part of the columns
    each, and NEED_W dw (N, K) = -sign * grad. dv is du of the transposed problem, with U and V
    exchanged: there grad belongs to the columns, not GRAD_OF_ROWS.

    Tiling: a program owns a row tile, a rank tile and a part, and loops over the part's columns.
    Numerics: the signs are exact in every dtype; grad multiplies the finished sum where it belongs
    to rows, else V before that is rounded to its dtype again. Sums are float32.
    Traffic: W once per rank tile; V twice per row tile, from L2.
    Relies on: dw is C-contiguous, part is a multiple of BLOCK_K.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    begin = split * part
    if GRAD_OF_ROWS:
        grad = tl.load(grad_ptr + rows, mask=rows < N, other=0.0)
    if NEED_W:
        # Every rank tile has the signs; the first one writes them.
        written = tl.where(tl.program_id(1) == 0, N, 0)

    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for first in range(begin, tl.minimum(begin + part, K), BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K).to(tl.int64)
        z = _difference(
            u_ptr,
            v_ptr,
            w_ptr,
            rows,
            columns,
            N,
            K,
            R,
            u_stride_n,
            u_stride_r,
            v_stride_k,
            v_stride_r,
            w_stride_n,
            w_stride_k,
            WITH_W,
            BLOCK_N,
            BLOCK_K,
            BLOCK_R,
        )
        sign = tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0))
        if NEED_W:
            tl.store(
                dw_ptr + rows[:, None] * K + columns[None, :],
                (-sign * grad[:, None]).to(dw_ptr.dtype.element_ty),
                mask=(rows < written)[:, None] & (columns < K)[None, :],
            )
        v = tl.load(
            v_ptr + columns[:, None] * v_stride_k + ranks[None, :] * v_stride_r,
            mask=(columns < K)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )
        if not GRAD_OF_ROWS:
            factor = tl.load(grad_ptr + columns, mask=columns < K, other=0.0)
            v = (v.to(tl.float32) * factor[:, None]).to(DOT)
        acc = tl.dot(sign.to(DOT), v, acc, input_precision="ieee")
    if GRAD_OF_ROWS:
        acc *= grad[:, None]
    tl.store(
        parts_ptr + (split.to(tl.int64) * N + rows)[:, None] * R + ranks[None, :],
        acc,
        mask=(rows < N)[:, None] & (ranks < R)[None, :],
    )


# -- launchers -------------------------------------------------------------------------------------


def _meta(tile: Tile) -> dict[str, Any]:
    return {
        "BLOCK_N": tile.rows,
        "BLOCK_K": tile.columns,
        "BLOCK_R": tile.rank,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **OPTIONS,
    }


def _operands(u: torch.Tensor, v: torch.Tensor, w: torch.Tensor | None) -> dict[str, Any]:
    return {
        "u_ptr": u,
        "v_ptr": v,
        "w_ptr": w,
        "N": u.shape[0],
        "K": v.shape[0],
        "R": u.shape[1],
        "u_stride_n": u.stride(0),
        "u_stride_r": u.stride(1),
        "v_stride_k": v.stride(0),
        "v_stride_r": v.stride(1),
        "w_stride_n": 0 if w is None else w.stride(0),
        "w_stride_k": 0 if w is None else w.stride(1),
        "DOT": DOT_TYPES[u.dtype],
        "WITH_W": w is not None,
    }


def row_sums(
    device: Device, sums: torch.Tensor, u: torch.Tensor, v: torch.Tensor, w: torch.Tensor | None
) -> None:
    """sums = sum_k |U V^T - W|, N and K at least 1."""
    (n, r), k = u.shape, v.shape[0]
    tile = tile_of(SUMS_TILES, r, u.dtype is not torch.float32)
    tiles = triton.cdiv(n, tile.rows)
    splits, part = parts_of(k, tile.columns, tiles, device)
    parts = sums if splits == 1 else sums.new_empty((splits, n))
    _abs_row_sums_kernel[(tiles, splits)](parts, part=part, **_operands(u, v, w), **_meta(tile))
    if parts is not sums:
        sum_parts(sums, parts)


def factor_gradient(
    device: Device,
    du: torch.Tensor | None,
    dw: torch.Tensor | None,
    grad: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor | None,
    *,
    grad_of_rows: bool,
) -> None:
    """du = (sign(U V^T - W) * grad) V, beside it dw = -sign * grad; what is None is not kept."""
    (n, r), k = u.shape, v.shape[0]
    tile = tile_of(SUMS_TILES, r, u.dtype is not torch.float32)
    over_rows, over_ranks = triton.cdiv(n, tile.rows), max(1, triton.cdiv(r, tile.rank))
    splits, part = parts_of(k, tile.columns, over_rows * over_ranks, device)
    parts = grad.new_empty((splits, n, r))
    _abs_row_sums_backward_kernel[(over_rows, over_ranks, splits)](
        parts,
        dw,
        grad,
        part=part,
        NEED_W=dw is not None,
        GRAD_OF_ROWS=grad_of_rows,
        **_operands(u, v, w),
        **_meta(tile),
    )
    if du is not None:
        sum_parts(du, parts)


def _unsupported(lead: torch.Tensor, *_: Any) -> str | None:
    return why_no_triton(lead)


@implement("abs_row_sums", "triton", unsupported=_unsupported)
def abs_row_sums(
    sums: torch.Tensor, u: torch.Tensor, v: torch.Tensor, w: torch.Tensor | None
) -> None:
    if len(u) == 0 or len(v) == 0:
        sums.zero_()
        return
    with torch.cuda.device_of(u):
        row_sums(device_of(u), sums, u, v, w)


@implement("abs_row_sums_backward", "triton", unsupported=_unsupported)
def abs_row_sums_backward(
    du: torch.Tensor,
    dv: torch.Tensor,
    dw: torch.Tensor,
    grad: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor | None,
    need: Sequence[bool],
) -> None:
    if len(u) == 0 or len(v) == 0:
        for needed, output in zip(need, (du, dv, dw), strict=True):
            if needed:
                output.zero_()
        return
    grad = grad.contiguous()
    with torch.cuda.device_of(u):
        device = device_of(u)
        if need[0] or need[2]:
            own, base = du if need[0] else None, dw if need[2] else None
            factor_gradient(device, own, base, grad, u, v, w, grad_of_rows=True)
        if need[1]:
            transposed = None if w is None else w.T
            factor_gradient(device, dv, None, grad, v, u, transposed, grad_of_rows=False)
