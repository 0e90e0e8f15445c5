"""Products of 4-bit weights with quantized activations on Triton: int4_linear_a8, int4_linear_a4.

Symbols as in ``pyfastft/ops/ptq4.md``. Activations are quantized by a kernel of their own, which
reads x once and leaves one byte for an element; the product multiplies bytes on tensor cores.
Products of integers are exact and the rest is IEEE operations one by one, never fused: the bits are
the reference's. Masks go over every edge, so any size works.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft.triton_kernels._common import why_no_triton

# Adding it rounds a float of less than 2^22 to an integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)
_INFINITY = tl.constexpr(0x7F800000)
# Nothing is fused: what is promised bit for bit is what the source says.
EXACT_OPTIONS = {"enable_fp_fusion": False, "maxnreg": 255}
# Places of a group that a program holds at once, and elements of its tile.
_LONGEST_RUN, _TILE = 1024, 1024
# Bytes of codes at a time, the least that tensor cores multiply.
_BLOCK_B = 32


@triton.jit
def rounded(v):
    """round(v), ties to even, of less than 2^22."""
    return (v + ROUNDER) - ROUNDER


@triton.jit
def range_of(scale_ptr, zero_ptr, at, mask):
    """Scale and integer zero of the ranges ``at``; a NaN as scale where there is no such range."""
    scale = tl.load(scale_ptr + at, mask=mask, other=1.0)
    zero = tl.load(zero_ptr + at, mask=mask, other=0.0)
    fine = (scale > 0) & (zero - zero == 0)
    inside = tl.where(fine, tl.minimum(tl.maximum(zero, 0.0), 15.0), 0.0)
    return tl.where(fine, scale, float("nan")), rounded(inside)


@triton.jit
def _load_places(x_ptr, perm_ptr, rows, places, mask, x_stride_m, x_stride_k, PERM: tl.constexpr):
    """A tile of x in float32, at its places."""
    columns = places
    if PERM:
        columns = tl.load(perm_ptr + places)
    at = rows[:, None] * x_stride_m + columns.to(tl.int64)[None, :] * x_stride_k
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _quantize_kernel(
    q_ptr,
    q_scale_ptr,
    q_sum_ptr,
    x_ptr,
    perm_ptr,
    x_scale_ptr,
    x_zero_ptr,
    M,
    K,
    GROUP,
    GROUPS,
    row_bytes,
    plane,
    x_stride_m,
    x_stride_k,
    PERM: tl.constexpr,
    LEARNED: tl.constexpr,
    X_GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes q (2, M, row_bytes), even places and odd ones apart: round(x / s) of a group of a
    row, s (M, G), and the sums of q, (M, G). LEARNED: of 4 bits within x_scale and x_zero, one of
    them or one for each group (X_GROUPED); else of 8 bits, s being the largest magnitude / 127.

    Tiling: a program owns BLOCK_M rows and a group, which it goes through twice, the second time
    from the cache, where it is longer than BLOCK_K.
    Numerics: float32, division rounded to nearest. Traffic: x once, one byte written for each.
    Relies on: q is contiguous; what stands behind the last place of a row is not read.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    begin = group * GROUP
    end = tl.minimum(begin + GROUP, K)

    largest = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(begin, end, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        there = places < end
        places = tl.where(there, places, 0)
        mask = (rows < M)[:, None] & there[None, :]
        x = _load_places(x_ptr, perm_ptr, rows, places, mask, x_stride_m, x_stride_k, PERM)
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(bits, axis=1))

    if LEARNED:
        which = group * X_GROUPED + tl.zeros((BLOCK_M,), tl.int32)
        scale, zero = range_of(x_scale_ptr, x_zero_ptr, which, rows < M)
        divisor, low, high = scale, -zero, 15.0 - zero
        scale = tl.where(largest > _INFINITY, float("nan"), scale)
    else:
        magnitude = largest.to(tl.float32, bitcast=True)
        scale = tl.div_rn(magnitude, tl.full((BLOCK_M,), 127.0, tl.float32))
        scale = tl.where(largest < _INFINITY, scale, float("nan"))
        # Where all are zeros, or too small for a scale, so are the codes.
        divisor = tl.where(scale > 0, scale, 1.0)
        low = tl.full((BLOCK_M,), -127.0, tl.float32)
        high = tl.full((BLOCK_M,), 127.0, tl.float32)

    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(begin, end, BLOCK_K):
        all_places = first + tl.arange(0, BLOCK_K)
        there = all_places < end
        places = tl.where(there, all_places, 0)
        mask = (rows < M)[:, None] & there[None, :]
        x = _load_places(x_ptr, perm_ptr, rows, places, mask, x_stride_m, x_stride_k, PERM)
        divisors = tl.broadcast_to(divisor[:, None], (BLOCK_M, BLOCK_K))
        steps = tl.div_rn(x, divisors)
        q = rounded(tl.minimum(tl.maximum(steps, low[:, None]), high[:, None]))
        # What is no number has no code; its row's scale says so.
        q = tl.where((steps == steps) & mask, q, 0.0)
        total += tl.sum(q, axis=1)
        of_place = (places % 2).to(tl.int64) * plane + places // 2
        at = rows[:, None] * row_bytes + of_place[None, :]
        tl.store(q_ptr + at, q.to(tl.int8), mask=mask)
    at = rows * GROUPS + group
    tl.store(q_scale_ptr + at, scale, mask=rows < M)
    tl.store(q_sum_ptr + at, total, mask=rows < M)


@triton.jit
def _int4_bytes_kernel(
    y_ptr,
    q_ptr,
    q_scale_ptr,
    q_sum_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    M,
    N,
    K,
    GROUP,
    GROUPS,
    row_bytes,
    plane,
    codes_stride_n,
    codes_stride_k,
    INTEGER_ZERO: tl.constexpr,
    FLOAT_ZERO: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Computes y (M, N) = sum over groups of (s s_W) * (q (c - z)^T - [FLOAT_ZERO] z sum(q)), + b.

    Tiling: a program owns a tile of y and goes through the groups, BLOCK_B bytes of codes at a
    time; even places and odd ones are two products.
    Numerics: bytes in int32, groups in float32 in sequence, operation by operation.
    Traffic: codes once per tile of rows, q once per tile of columns, from L2.
    Relies on: q as _quantize_kernel leaves it; scale, zero, bias and y are contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Offsets within the tile are 32-bit: what is kept of them through the loop is half as much.
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q_ptr += tl.program_id(0).to(tl.int64) * BLOCK_M * row_bytes
    codes_ptr += tl.program_id(1).to(tl.int64) * BLOCK_N * codes_stride_n
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(0, GROUPS):
        begin = group * GROUP
        end = tl.minimum(begin + GROUP, K)
        of_column = columns * GROUPS + group
        of_row = rows * GROUPS + group
        if FLOAT_ZERO:
            minus = tl.zeros((BLOCK_N,), tl.int8)
        elif INTEGER_ZERO:
            minus = tl.load(zero_ptr + of_column, mask=columns < N, other=0).to(tl.int8)
        else:
            minus = tl.full((BLOCK_N,), 8, tl.int8)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for first in range(begin // 2, (end + 1) // 2, BLOCK_B):
            # A byte on the edge of a group belongs to its neighbour too.
            at = first + tl.arange(0, BLOCK_B)
            even = (2 * at >= begin) & (2 * at < end)
            odd = (2 * at + 1 >= begin) & (2 * at + 1 < end)
            byte = tl.load(
                codes_ptr + (at[:, None] * codes_stride_k + column[None, :] * codes_stride_n),
                mask=(even | odd)[:, None] & (columns < N)[None, :],
                other=0,
            )
            q_at = row[:, None] * row_bytes + at[None, :]
            in_rows = (rows < M)[:, None]
            q = tl.load(q_ptr + q_at, mask=in_rows & even[None, :], other=0)
            low = (byte & 15).to(tl.int8) - minus[None, :]
            products = tl.dot(q, low, products, out_dtype=tl.int32)
            q = tl.load(q_ptr + plane + q_at, mask=in_rows & odd[None, :], other=0)
            high = (byte >> 4).to(tl.int8) - minus[None, :]
            products = tl.dot(q, high, products, out_dtype=tl.int32)
        value = products.to(tl.float32)
        if FLOAT_ZERO:
            zero = tl.load(zero_ptr + of_column, mask=columns < N, other=0.0).to(tl.float32)
            q_sum = tl.load(q_sum_ptr + of_row, mask=rows < M, other=0.0)
            value = value - zero[None, :] * q_sum[:, None]
        scale = tl.load(scale_ptr + of_column, mask=columns < N, other=0.0).to(tl.float32)
        q_scale = tl.load(q_scale_ptr + of_row, mask=rows < M, other=0.0)
        total = total + (q_scale[:, None] * scale[None, :]) * value
    if WITH_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        total = total + bias[None, :]
    tl.store(
        y_ptr + rows[:, None] * N + columns[None, :],
        total.to(y_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (columns < N)[None, :],
    )


# -- launchers -------------------------------------------------------------------------------------


def unsupported(lead: torch.Tensor, *_: Any) -> str | None:
    """Why Triton cannot run an op of this first argument."""
    return why_no_triton(lead)


def tile_of_group(group: int) -> tuple[int, int]:
    """Rows and places of a tile of _quantize_kernel."""
    places = min(triton.next_power_of_2(group), _LONGEST_RUN)
    return max(1, _TILE // places), places


def bytes_of_row(k: int) -> int:
    """Of a plane of q: a multiple of what a load takes at once."""
    return triton.cdiv(triton.cdiv(k, 2), 16) * 16


def quantize(
    x: torch.Tensor,
    perm: torch.Tensor | None,
    learned: tuple[torch.Tensor, torch.Tensor] | None,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, its scales and its sums, of x (M, K); learned: x_scale and x_zero."""
    m, k = x.shape
    groups, row_bytes = triton.cdiv(k, group), bytes_of_row(k)
    q = x.new_empty((2, m, row_bytes), dtype=torch.int8)
    q_scale = x.new_empty((m, groups), dtype=torch.float32)
    q_sum = torch.empty_like(q_scale)
    block_m, block_k = tile_of_group(group)
    x_scale, x_zero = (None, None) if learned is None else (t.contiguous() for t in learned)
    _quantize_kernel[(triton.cdiv(m, block_m), groups)](
        q,
        q_scale,
        q_sum,
        x,
        perm,
        x_scale,
        x_zero,
        m,
        k,
        group,
        groups,
        row_bytes,
        m * row_bytes,
        x.stride(0),
        x.stride(1),
        PERM=perm is not None,
        LEARNED=learned is not None,
        X_GROUPED=x_scale is not None and len(x_scale) > 1,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=1,
        **EXACT_OPTIONS,
    )
    return q, q_scale, q_sum


def tile_of_product(m: int) -> dict[str, Any]:
    """The tile of y, of which there are two accumulators, integers and floats. 64 columns, half as
    many warps, or tiles in flight spill on one architecture or another: bytes at addresses of
    unknown alignment are loaded one by one."""
    block_m = min(64, max(16, triton.next_power_of_2(m)))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 32,
        "BLOCK_B": _BLOCK_B,
        "num_warps": 8 if block_m == 64 else 4,
        "num_stages": 1,
    }


def linear(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    learned: tuple[torch.Tensor, torch.Tensor] | None,
    group_size: int,
) -> None:
    """y (M, N) = x^ W^T + b of x (M, K), M, N and K at least 1."""
    (m, k), n = x.shape, codes.shape[0]
    group = min(group_size, k)
    perm = None if perm is None else perm.contiguous()
    q, q_scale, q_sum = quantize(x, perm, learned, group)
    tile = tile_of_product(m)
    _int4_bytes_kernel[(triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"]))](
        y,
        q,
        q_scale,
        q_sum,
        codes,
        scale.contiguous(),
        None if zero is None else zero.contiguous(),
        None if bias is None else bias.contiguous(),
        m,
        n,
        k,
        group,
        triton.cdiv(k, group),
        bytes_of_row(k),
        m * bytes_of_row(k),
        codes.stride(0),
        codes.stride(1),
        INTEGER_ZERO=zero is not None and not zero.is_floating_point(),
        FLOAT_ZERO=zero is not None and zero.is_floating_point(),
        WITH_BIAS=bias is not None,
        **tile,
        **EXACT_OPTIONS,
    )
