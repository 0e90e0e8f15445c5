"""Checks that the contracts of the family share."""

from __future__ import annotations

import torch

from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._codebook import CODEBOOKS
from pyfastft.ops.lora._operands import expect_packed


def expect_int4(
    op: str,
    lead: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
) -> tuple[int, int]:
    """One 4-bit weight (N, K) on the lead's device, or on that of ``codes``. Returns (N, G).

    codes (N, ceil(K / 2)) uint8; scale (N, G) float32 or bfloat16, or float64 beside a float64
    lead, G = ceil(K / group_size); zero (N, G), uint8 or of the scale's dtype; perm (K,) int32.
    """
    expect_dense(op, None if lead is None else lead.device, codes=codes)
    expect_dense(op, codes.device, scale=scale)
    expect_dtype(op, "codes", codes, (torch.uint8,))
    if codes.dim() != 2:
        expect_shape(op, "codes", codes, ("N", "ceil(K / 2)"))
    if k < 0:
        reject(op, "k", "a size", k)
    if group_size < 1:
        reject(op, "group_size", "at least 1", group_size)
    if codebook not in CODEBOOKS:
        reject(op, "codebook", " or ".join(CODEBOOKS), repr(codebook))
    n, groups = codes.shape[0], -(-k // group_size)
    if codes.shape[1] != -(-k // 2):
        because = f"to hold two codes of K = {k} in a byte"
        expect_shape(op, "codes", codes, ("N", -(-k // 2)), because)
    grouped = f"to have groups of {group_size} of K = {k}"
    expect_shape(op, "scale", scale, (n, groups), grouped)
    dtypes = [torch.float32, torch.bfloat16]
    if lead is None or lead.dtype is torch.float64:
        dtypes.append(torch.float64)
    expect_dtype(op, "scale", scale, dtypes)
    if zero is not None:
        expect_dense(op, codes.device, zero=zero)
        if codebook != "int4":
            because = f"beside the codebook {codebook}, which has no zero-point"
            reject(op, "zero", "None", "a tensor", because=because)
        expect_shape(op, "zero", zero, (n, groups), grouped)
        expect_dtype(op, "zero", zero, (torch.uint8, scale.dtype), "beside scale")
    if perm is not None:
        expect_dense(op, codes.device, perm=perm)
        expect_shape(op, "perm", perm, (k,), "to name the input feature of every code")
        expect_dtype(op, "perm", perm, (torch.int32,))
    return n, groups


def expect_int4_packed(op: str, codes: torch.Tensor, packed: torch.Tensor | None) -> None:
    """The codes as a backend packed them, or None."""
    if packed is not None:
        expect_packed(op, codes.device, "packed", packed)


def expect_trainable(op: str, zero: torch.Tensor | None, needed: bool) -> None:
    """A zero-point that a gradient is asked for must be a float."""
    if needed and (zero is None or not zero.is_floating_point()):
        got = "None" if zero is None else str(zero.dtype).removeprefix("torch.")
        reject(op, "zero", "a float dtype", got, because="to compute its gradient", error=TypeError)
