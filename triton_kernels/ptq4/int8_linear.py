"""int8_linear and its gradients on Triton: codes are widened on their way to the tensor cores.

Symbols as in ``pyfastft/ops/ptq4.md``. A code is exact in every dtype of x, and the scale
multiplies the finished sum, in float32; in dX, whose sum runs over the outputs, it multiplies dY.
Masks go over every edge, so any size works; sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft._op import implement
from pyfastft.reference.lora.linear import rows as as_matrix
from pyfastft.triton_kernels._common import DOT_TYPES, OPTIONS, device_of
from pyfastft.triton_kernels._plan import Device, parts_of
from pyfastft.triton_kernels.lora._stages import sum_parts
from pyfastft.triton_kernels.ptq4._rounded import unsupported


@triton.jit
def _int8_product_kernel(
    out_ptr,
    a_ptr,
    codes_ptr,
    scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    a_stride_m,
    a_stride_k,
    codes_stride_n,
    codes_stride_k,
    DOT: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    SCALED_DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes out (M, N) = (a codes^T) * scale + bias; with SCALED_DEPTH (a * scale) codes^T.

    Tiling: a program owns a tile of the output and loops over K. Numerics: dot products of a's
    dtype, with SCALED_DEPTH rounded to it again; the rest float32.
    Traffic: a once per tile of columns, codes once per tile of rows. Relies on: out is contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        depth = first + tl.arange(0, BLOCK_K).to(tl.int64)
        a = tl.load(
            a_ptr + rows[:, None] * a_stride_m + depth[None, :] * a_stride_k,
            mask=(rows < M)[:, None] & (depth < K)[None, :],
            other=0.0,
        )
        if SCALED_DEPTH:
            factor = tl.load(scale_ptr + depth, mask=depth < K, other=0.0)
            a = (a.to(tl.float32) * factor[None, :]).to(DOT)
        codes = tl.load(
            codes_ptr + depth[:, None] * codes_stride_k + columns[None, :] * codes_stride_n,
            mask=(depth < K)[:, None] & (columns < N)[None, :],
            other=0,
        )
        acc = tl.dot(a, codes.to(tl.float32).to(DOT), acc, input_precision="ieee")
    if not SCALED_DEPTH:
        acc *= tl.load(scale_ptr + columns, mask=columns < N, other=0.0)[None, :]
    if WITH_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * N + columns[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (columns < N)[None, :],
    )


@triton.jit
def _int8_scale_gradient_kernel(
    parts_ptr,
    grad_ptr,
    x_ptr,
    codes_ptr,
    M,
    N,
    K,
    part,
    grad_stride_m,
    grad_stride_n,
    x_stride_m,
    x_stride_k,
    codes_stride_n,
    codes_stride_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Computes parts (splits, N) = sum_k (grad^T x) * codes over one part of the inputs each.

    Tiling: a program owns a tile of outputs and a part; a tile of grad^T x is made and thrown away.
    Numerics: dot products of x's dtype, the rest float32; every input of the tile has its own sum.
    Relies on: part is a multiple of BLOCK_K.
    """
    outputs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    begin = split * part
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(begin, tl.minimum(begin + part, K), BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K).to(tl.int64)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for row in range(0, M, BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M).to(tl.int64)
            grad = tl.load(
                grad_ptr + outputs[:, None] * grad_stride_n + rows[None, :] * grad_stride_m,
                mask=(outputs < N)[:, None] & (rows < M)[None, :],
                other=0.0,
            )
            x = tl.load(
                x_ptr + rows[:, None] * x_stride_m + inputs[None, :] * x_stride_k,
                mask=(rows < M)[:, None] & (inputs < K)[None, :],
                other=0.0,
            )
            acc = tl.dot(grad, x, acc, input_precision="ieee")
        codes = tl.load(
            codes_ptr + outputs[:, None] * codes_stride_n + inputs[None, :] * codes_stride_k,
            mask=(outputs < N)[:, None] & (inputs < K)[None, :],
            other=0,
        )
        sums += acc * codes.to(tl.float32)
    to = parts_ptr + split.to(tl.int64) * N + outputs
    tl.store(to, tl.sum(sums, axis=1), mask=outputs < N)


# -- launchers -------------------------------------------------------------------------------------

# By whether tensor cores multiply: rows, columns, depth, num_warps, num_stages. On half as many
# warps 64 of each spill, where codes of unknown alignment are loaded one by one. float32 holds its
# operands in registers.
_TILES = {True: (64, 64, 64, 8, 3), False: (32, 32, 32, 4, 1)}


def _tile(x: torch.Tensor, names: str) -> dict[str, Any]:
    """The tile, its sides named in order."""
    *sides, num_warps, num_stages = _TILES[x.dtype is not torch.float32]
    blocks = {f"BLOCK_{name}": side for name, side in zip(names, sides, strict=True)}
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages, **OPTIONS}


def product(
    out: torch.Tensor,
    a: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    scaled_depth: bool,
) -> None:
    """out = (a codes^T) * scale + bias, or (a * scale) codes^T; of a (M, K) and codes (N, K)."""
    (m, k), n = a.shape, codes.shape[0]
    tile = _tile(a, "MNK")
    _int8_product_kernel[(triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"]))](
        out,
        a,
        codes,
        scale.contiguous(),
        None if bias is None else bias.contiguous(),
        m,
        n,
        k,
        a.stride(0),
        a.stride(1),
        codes.stride(0),
        codes.stride(1),
        DOT=DOT_TYPES[a.dtype],
        WITH_BIAS=bias is not None,
        SCALED_DEPTH=scaled_depth,
        **tile,
    )


def scale_gradient(
    device: Device,
    dscale: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """dscale = sum_k (grad^T x) * codes, M, N and K at least 1."""
    (m, k), n = x.shape, codes.shape[0]
    tile = _tile(x, "NKM")
    over_outputs = triton.cdiv(n, tile["BLOCK_N"])
    splits, part = parts_of(k, tile["BLOCK_K"], over_outputs, device)
    parts = dscale if splits == 1 else dscale.new_empty((splits, n))
    _int8_scale_gradient_kernel[(over_outputs, splits)](
        parts,
        grad,
        x,
        codes,
        m,
        n,
        k,
        part,
        grad.stride(0),
        grad.stride(1),
        x.stride(0),
        x.stride(1),
        codes.stride(0),
        codes.stride(1),
        **tile,
    )
    if parts is not dscale:
        sum_parts(dscale, parts)


@implement("int8_linear", "triton", unsupported=unsupported)
def int8_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    if y.numel() == 0:
        return
    with torch.cuda.device_of(x):
        product(as_matrix(y), as_matrix(x), codes, scale, bias, scaled_depth=False)


@implement("int8_linear_backward", "triton", unsupported=unsupported)
def int8_linear_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dbias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    need: Sequence[bool],
) -> None:
    grad = as_matrix(grad)
    with torch.cuda.device_of(grad):
        if need[0] and dx.numel():
            product(as_matrix(dx), grad, codes.T, scale, None, scaled_depth=True)
        if need[1] and dscale.numel():
            assert x is not None
            x = as_matrix(x)
            if x.numel():
                scale_gradient(device_of(x), dscale, grad, x, codes)
            else:
                dscale.zero_()
        if need[2]:
            torch.sum(grad, dim=0, out=dbias)
