"""int4_dequantize, and what the family's other ops share of it."""

from __future__ import annotations

import torch

from pyfastft._codebook import IMPLIED_ZERO, TABLES
from pyfastft._op import implement
from pyfastft.ops.lora._operands import wide


def unpacked(codes: torch.Tensor, k: int) -> torch.Tensor:
    """The codes (N, K), uint8; a byte's low nibble comes first."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, :k]


def per_column(grouped: torch.Tensor, k: int, group_size: int) -> torch.Tensor:
    """(N, G) as (N, K): each group's value for all of its columns."""
    return grouped.repeat_interleave(min(group_size, max(k, 1)), dim=1)[:, :k]


def steps(
    codes: torch.Tensor,
    zero: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W / scale, (N, K), in the order of the codes: c - zero, or table[c]."""
    table = torch.tensor(TABLES[codebook], dtype=torch.float32, device=codes.device).to(dtype)
    values = table[unpacked(codes, k).long()]
    if codebook != "int4":
        return values
    if zero is None:
        return values - IMPLIED_ZERO
    return values - per_column(zero.to(dtype), k, group_size)


def in_order_of_features(matrix: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
    """Column j of (N, K) as column perm[j]."""
    if perm is None:
        return matrix
    moved = torch.empty_like(matrix)
    moved[:, perm.long()] = matrix
    return moved


def in_order_of_codes(matrix: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
    """Column perm[j] of (M, K) as column j."""
    return matrix if perm is None else matrix[:, perm.long()]


def dequantized(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W (N, K), rounded to ``dtype`` once."""
    exact = torch.promote_types(wide(dtype), wide(scale.dtype))
    weight = steps(codes, zero, k, group_size, codebook, exact)
    weight = weight * per_column(scale.to(exact), k, group_size)
    return in_order_of_features(weight, perm).to(dtype)


@implement("int4_dequantize", "reference")
def int4_dequantize(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
    dtype: torch.dtype,
) -> None:
    """W[n, perm[j]] = scale[n, j // g] * (c[n, j] - zero[n, j // g]), or scale * table[c]."""
    weight.copy_(dequantized(codes, scale, zero, perm, k, group_size, codebook, dtype))
