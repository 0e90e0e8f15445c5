"""fake_quantize4 and its gradients on Triton: one pass over x, and over dY.

Symbols as in ``pyfastft/ops/ptq4.md``. The forward has the reference's bits: division is rounded to
nearest, and nothing is fused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from pyfastft._op import implement
from pyfastft.reference.lora.linear import rows as as_matrix
from pyfastft.triton_kernels.ptq4._rounded import (
    EXACT_OPTIONS,
    range_of,
    rounded,
    unsupported,
)

# Rows by places of a tile, 64 bytes of a row at least.
_BLOCK_M, _BLOCK_K = 32, 64


@triton.jit
def _columns(perm_ptr, places, K, PERM: tl.constexpr):
    """The features at some places."""
    if PERM:
        return tl.load(perm_ptr + places, mask=places < K, other=0).to(tl.int64)
    else:
        return places


@triton.jit
def _fake_quantize4_kernel(
    y_ptr,
    x_ptr,
    x_scale_ptr,
    x_zero_ptr,
    perm_ptr,
    M,
    K,
    GROUP,
    x_stride_m,
    x_stride_k,
    PERM: tl.constexpr,
    X_GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes y (M, K) = s * clamp(round(x / s), -z, 15 - z), C-contiguous; a program, a tile."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    places = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = _columns(perm_ptr, places, K, PERM)
    mask = (rows < M)[:, None] & (places < K)[None, :]
    x = tl.load(
        x_ptr + rows[:, None] * x_stride_m + columns[None, :] * x_stride_k, mask=mask, other=0.0
    ).to(tl.float32)
    scale, zero = range_of(x_scale_ptr, x_zero_ptr, places // GROUP * X_GROUPED, places < K)
    steps = tl.div_rn(x, tl.broadcast_to(scale[None, :], (BLOCK_M, BLOCK_K)))
    q = rounded(tl.minimum(tl.maximum(steps, -zero[None, :]), 15.0 - zero[None, :]))
    y = tl.where(steps == steps, scale[None, :] * q, steps)
    tl.store(y_ptr + rows[:, None] * K + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fake_quantize4_backward_kernel(
    dx_ptr,
    parts_ptr,
    grad_ptr,
    x_ptr,
    x_scale_ptr,
    x_zero_ptr,
    perm_ptr,
    M,
    K,
    GROUP,
    part,
    grad_stride_m,
    grad_stride_k,
    x_stride_m,
    x_stride_k,
    NEED_X: tl.constexpr,
    NEED_RANGE: tl.constexpr,
    PERM: tl.constexpr,
    X_GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes NEED_X dx (M, K), and NEED_RANGE parts (splits, 2, K): what every place adds to the
    gradients of its scale and of its zero, over one part of the rows each.

    Tiling: a program owns BLOCK_K places and a part of the rows. Numerics: float32; every row of
    the tile has its own sum, and these are added up in float64: a range's gradient is one number.
    Relies on: part is a multiple of BLOCK_M; dx is C-contiguous.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1).to(tl.int64)
    columns = _columns(perm_ptr, places, K, PERM)
    scale, zero = range_of(x_scale_ptr, x_zero_ptr, places // GROUP * X_GROUPED, places < K)
    scales = tl.broadcast_to(scale[None, :], (BLOCK_M, BLOCK_K))
    low, high = -zero[None, :], 15.0 - zero[None, :]
    of_scale = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    outside = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    begin = split * part
    for first in range(begin, tl.minimum(begin + part, M), BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < M)[:, None] & (places < K)[None, :]
        x_at = rows[:, None] * x_stride_m + columns[None, :] * x_stride_k
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        grad_at = rows[:, None] * grad_stride_m + columns[None, :] * grad_stride_k
        dy = tl.load(grad_ptr + grad_at, mask=mask, other=0.0).to(tl.float32)
        steps = tl.div_rn(x, scales)
        inside = (steps >= low) & (steps <= high)
        number = steps == steps
        limited = tl.minimum(tl.maximum(steps, low), high)
        by = tl.where(inside, rounded(limited) - steps, limited)
        if NEED_RANGE:
            of_scale += tl.where(number, dy * by, steps)
            outside += tl.where(inside, 0.0, dy)
        if NEED_X:
            dx = tl.where(inside, dy, tl.where(number, 0.0, steps))
            tl.store(
                dx_ptr + rows[:, None] * K + columns[None, :],
                dx.to(dx_ptr.dtype.element_ty),
                mask=mask,
            )
    if NEED_RANGE:
        to = parts_ptr + split * 2 * K + places
        tl.store(to, tl.sum(of_scale.to(tl.float64), axis=0), mask=places < K)
        sums = -scale.to(tl.float64) * tl.sum(outside.to(tl.float64), axis=0)
        tl.store(to + K, sums, mask=places < K)


# -- launchers -------------------------------------------------------------------------------------

# Rows of one program of the backward: enough that its sums are a small part of the traffic.
_PART = 8 * _BLOCK_M


def _of_ranges(places: torch.Tensor, x_scale: torch.Tensor, group: int) -> torch.Tensor:
    """(K,) summed over the places that share a range."""
    if len(x_scale) == 1:
        return places.sum(0, keepdim=True)
    missing = len(x_scale) * group - len(places)
    return torch.nn.functional.pad(places, (0, missing)).view(-1, group).sum(1)


@implement("fake_quantize4", "triton", unsupported=unsupported)
def fake_quantize4(
    y: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    perm: torch.Tensor | None,
    group_size: int,
) -> None:
    if y.numel() == 0:
        return
    x = as_matrix(x)
    m, k = x.shape
    with torch.cuda.device_of(x):
        _fake_quantize4_kernel[(triton.cdiv(m, _BLOCK_M), triton.cdiv(k, _BLOCK_K))](
            y,
            x,
            x_scale.contiguous(),
            x_zero.contiguous(),
            None if perm is None else perm.contiguous(),
            m,
            k,
            min(group_size, k),
            x.stride(0),
            x.stride(1),
            PERM=perm is not None,
            X_GROUPED=len(x_scale) > 1,
            BLOCK_M=_BLOCK_M,
            BLOCK_K=_BLOCK_K,
            num_warps=4,
            num_stages=1,
            **EXACT_OPTIONS,
        )


@implement("fake_quantize4_backward", "triton", unsupported=unsupported)
def fake_quantize4_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dzero: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    perm: torch.Tensor | None,
    group_size: int,
    need: Sequence[bool],
) -> None:
    if x.numel() == 0:
        for gradient in (dscale, dzero):
            gradient.zero_()
        return
    x, grad = as_matrix(x), as_matrix(grad)
    m, k = x.shape
    group, splits = min(group_size, k), triton.cdiv(m, _PART)
    need_range = need[1] or need[2]
    parts = x_scale.new_empty((splits, 2, k), dtype=torch.float64) if need_range else None
    with torch.cuda.device_of(x):
        _fake_quantize4_backward_kernel[(triton.cdiv(k, _BLOCK_K), splits)](
            dx if need[0] else None,
            parts,
            grad,
            x,
            x_scale.contiguous(),
            x_zero.contiguous(),
            None if perm is None else perm.contiguous(),
            m,
            k,
            group,
            _PART,
            grad.stride(0),
            grad.stride(1),
            x.stride(0),
            x.stride(1),
            NEED_X=need[0],
            NEED_RANGE=need_range,
            PERM=perm is not None,
            X_GROUPED=len(x_scale) > 1,
            BLOCK_M=_BLOCK_M,
            BLOCK_K=_BLOCK_K,
            num_warps=4,
            num_stages=1,
            **EXACT_OPTIONS,
        )
    if parts is None:
        return
    of_scale, of_zero = parts.sum(0)
    if need[1]:
        dscale.copy_(_of_ranges(of_scale, x_scale, group))
    if need[2]:
        found = _of_ranges(of_zero, x_scale, group)
        dzero.copy_(torch.where((x_zero >= 0) & (x_zero <= 15), found, 0.0))
