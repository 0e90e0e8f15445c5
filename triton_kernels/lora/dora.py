"""What DoRA adds, on Triton: the norm of W's rows under a low-rank update, and a scale per column.

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
from pyfastft.triton_kernels._plan import NORM_TILES, SCALE_TILE, Device, parts_of, tile_of
from pyfastft.triton_kernels.lora._stages import TritonStages, sum_parts


@triton.jit
def _dora_norm_kernel(
    norm_ptr,
    weight_ptr,
    a_ptr,
    b_ptr,
    h_ptr,
    scaling_ptr,
    squared_ptr,
    N,
    K,
    R,
    w_stride_n,
    w_stride_k,
    a_stride_r,
    a_stride_k,
    b_stride_n,
    b_stride_r,
    DOT: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes norm (N) = sqrt(|W|^2 + sum_r B (2 s U + s^2 H)) with U = W A^T and H = B (A A^T).

    Tiling: a program owns a row tile, and loops over W's columns for each tile of ranks.
    Numerics: dot products of DOT; the rest, and every sum, float32; what cancelled to less than 0
    is 0, as in the reference.
    Traffic: W once per rank tile, the first of which takes |W|^2 with it unless it is KNOWN.
    Relies on: h (N, R) is C-contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.load(scaling_ptr)
    if KNOWN:
        squared = tl.load(squared_ptr + rows, mask=rows < N, other=0.0)
    else:
        squared = tl.zeros((BLOCK_N,), tl.float32)

    for first_rank in range(0, R, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R).to(tl.int64)
        u = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for first in range(0, K, BLOCK_K):
            columns = first + tl.arange(0, BLOCK_K).to(tl.int64)
            w = tl.load(
                weight_ptr + rows[:, None] * w_stride_n + columns[None, :] * w_stride_k,
                mask=(rows < N)[:, None] & (columns < K)[None, :],
                other=0.0,
            )
            a = tl.load(
                a_ptr + columns[:, None] * a_stride_k + ranks[None, :] * a_stride_r,
                mask=(columns < K)[:, None] & (ranks < R)[None, :],
                other=0.0,
            )
            if not KNOWN:
                squares += w.to(tl.float32) * w.to(tl.float32)
            u = tl.dot(w.to(DOT), a, u, input_precision="ieee")
        if not KNOWN:
            squared += tl.where(first_rank == 0, tl.sum(squares, axis=1), 0.0)
        inside = (rows < N)[:, None] & (ranks < R)[None, :]
        h = tl.load(h_ptr + rows[:, None] * R + ranks[None, :], mask=inside, other=0.0)
        b = tl.load(
            b_ptr + rows[:, None] * b_stride_n + ranks[None, :] * b_stride_r,
            mask=inside,
            other=0.0,
        )
        squared += tl.sum(b.to(tl.float32) * (2 * s * u + s * s * h), axis=1)

    tl.store(norm_ptr + rows, tl.sqrt(tl.maximum(squared, 0.0)), mask=rows < N)


@triton.jit(do_not_specialize=["M"])
def _scale_columns_kernel(
    y_ptr,
    x_ptr,
    scale_ptr,
    bias_ptr,
    M,
    N,
    x_stride_m,
    x_stride_n,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes y (M, N) = x * scale + bias, in float32, rounded once.

    Tiling: a program owns a tile. Traffic: x read once, y written once; y is C-contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    x = tl.load(
        x_ptr + rows[:, None] * x_stride_m + columns[None, :] * x_stride_n, mask=inside, other=0.0
    )
    y = x.to(tl.float32) * tl.load(scale_ptr + columns, mask=columns < N, other=0.0)[None, :]
    if BIASED:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + rows[:, None] * N + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=["M", "part"])
def _scale_columns_backward_kernel(
    dx_ptr,
    dscale_parts_ptr,
    dbias_parts_ptr,
    grad_ptr,
    x_ptr,
    scale_ptr,
    M,
    N,
    part,
    grad_stride_m,
    grad_stride_n,
    x_stride_m,
    x_stride_n,
    NEED_X: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes dx (M, N) = grad * scale, and over one part of the rows each, dscale_parts
    (splits, N) = sum grad * x and dbias_parts (splits, N) = sum grad.

    Tiling: a program owns a column tile and a part, and loops over the part's rows.
    Numerics: float32; every element of the tile has its own sum, joined at the end.
    Traffic: grad and x read once, dx written once. Relies on: part is a multiple of BLOCK_M.
    """
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    dscale = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if NEED_X:
        scale = tl.load(scale_ptr + columns, mask=columns < N, other=0.0)
    for step in range(0, part, BLOCK_M):
        rows = split * part + step + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        grad = tl.load(
            grad_ptr + rows[:, None] * grad_stride_m + columns[None, :] * grad_stride_n,
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        if NEED_SCALE:
            x = tl.load(
                x_ptr + rows[:, None] * x_stride_m + columns[None, :] * x_stride_n,
                mask=inside,
                other=0.0,
            )
            dscale += grad * x.to(tl.float32)
        if NEED_BIAS:
            dbias += grad
        if NEED_X:
            tl.store(
                dx_ptr + rows[:, None] * N + columns[None, :],
                (grad * scale[None, :]).to(dx_ptr.dtype.element_ty),
                mask=inside,
            )
    sums = split * N + columns
    if NEED_SCALE:
        tl.store(dscale_parts_ptr + sums, tl.sum(dscale, axis=0), mask=columns < N)
    if NEED_BIAS:
        tl.store(dbias_parts_ptr + sums, tl.sum(dbias, axis=0), mask=columns < N)


# -- launchers -------------------------------------------------------------------------------------


def row_norms(
    device: Device,
    norm: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    squared: torch.Tensor | None,
) -> None:
    """norm = |W + s B A| of rows, K and N at least 1."""
    (n, k), r = weight.shape, lora_a.shape[0]
    stages = TritonStages(device)
    # A A^T and B (A A^T): R by R and N by R.
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    gram = norm.new_empty((r, r))
    stages.down(xa=gram, x=lora_a, lora_a=lora_a, rng=None, threshold=0)
    h = norm.new_empty((n, r))
    stages.down(xa=h, x=lora_b, lora_a=gram, rng=None, threshold=0)
    tile = tile_of(NORM_TILES, r, lora_a.dtype is not torch.float32)
    _dora_norm_kernel[(triton.cdiv(n, tile.rows),)](
        norm,
        weight,
        lora_a,
        lora_b,
        h,
        scaling,
        None if squared is None else squared.contiguous(),
        N=n,
        K=k,
        R=r,
        w_stride_n=weight.stride(0),
        w_stride_k=weight.stride(1),
        a_stride_r=lora_a.stride(0),
        a_stride_k=lora_a.stride(1),
        b_stride_n=lora_b.stride(0),
        b_stride_r=lora_b.stride(1),
        DOT=DOT_TYPES[lora_a.dtype],
        KNOWN=squared is not None,
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=tile.rank,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **OPTIONS,
    )


def scaled(
    y: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """y (M, N) = x * scale + bias, M and N at least 1."""
    m, n = x.shape
    tile = SCALE_TILE
    _scale_columns_kernel[(triton.cdiv(m, tile.rows), triton.cdiv(n, tile.columns))](
        y,
        x,
        scale.contiguous(),
        None if bias is None else bias.contiguous(),
        M=m,
        N=n,
        x_stride_m=x.stride(0),
        x_stride_n=x.stride(1),
        BIASED=bias is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.num_warps,
        **OPTIONS,
    )


def scaled_backward(
    device: Device,
    dx: torch.Tensor | None,
    dscale: torch.Tensor | None,
    dbias: torch.Tensor | None,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    scale: torch.Tensor,
) -> None:
    """dx = grad * scale, dscale = sum grad * x, dbias = sum grad; what is None is not computed."""
    m, n = grad.shape
    tile = SCALE_TILE
    tiles = triton.cdiv(n, tile.columns)
    splits, part = parts_of(m, tile.rows, tiles, device)

    def sums(output: torch.Tensor | None) -> torch.Tensor | None:
        return None if output is None else scale.new_empty((splits, n))

    dscale_parts, dbias_parts = sums(dscale), sums(dbias)
    _scale_columns_backward_kernel[(tiles, splits)](
        dx,
        dscale_parts,
        dbias_parts,
        grad,
        x if dscale is not None else None,
        scale.contiguous(),
        M=m,
        N=n,
        part=part,
        grad_stride_m=grad.stride(0),
        grad_stride_n=grad.stride(1),
        x_stride_m=0 if x is None else x.stride(0),
        x_stride_n=0 if x is None else x.stride(1),
        NEED_X=dx is not None,
        NEED_SCALE=dscale is not None,
        NEED_BIAS=dbias is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        num_warps=tile.num_warps,
        **OPTIONS,
    )
    for output, parts in ((dscale, dscale_parts), (dbias, dbias_parts)):
        if output is not None and parts is not None:
            sum_parts(output, parts)


def _unsupported(lead: torch.Tensor, *_: Any) -> str | None:
    return why_no_triton(lead)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Leading dimensions as one; a copy only where no stride can express that."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


@implement("dora_norm", "triton", unsupported=_unsupported)
def dora_norm(
    norm: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    squared: torch.Tensor | None,
) -> None:
    if weight.numel() == 0:
        norm.zero_() if squared is None else norm.copy_(squared.clamp_min(0).sqrt())
        return
    with torch.cuda.device_of(weight):
        row_norms(device_of(weight), norm, weight, lora_a, lora_b, scaling, squared)


@implement("scale_columns", "triton", unsupported=_unsupported)
def scale_columns(
    y: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    if x.numel() == 0:
        return
    x = _matrix(x)
    with torch.cuda.device_of(x):
        scaled(y.view(x.shape), x, scale, bias)


@implement("scale_columns_backward", "triton", unsupported=_unsupported)
def scale_columns_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dbias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    scale: torch.Tensor,
    need: Sequence[bool],
) -> None:
    if grad.numel() == 0:
        for needed, output in zip(need, (dx, dscale, dbias), strict=True):
            if needed:
                output.zero_()
        return
    grad = _matrix(grad)
    x = None if x is None else _matrix(x)
    with torch.cuda.device_of(grad):
        scaled_backward(
            device_of(grad),
            dx if need[0] else None,
            dscale if need[1] else None,
            dbias if need[2] else None,
            grad,
            x,
            scale,
        )
