"""Checks that the contracts of the family share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._check import FLOATS, expect_dense, expect_dtype, expect_shape, reject
from pyfastft._random import dropout_threshold


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is kept in at least single precision: float64 beside float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def expect_lead(op: str, name: str, lead: torch.Tensor) -> None:
    """The operand whose dtype and device all others follow: x forward, the gradient backward."""
    expect_dense(op, None, **{name: lead})
    if lead.dtype not in FLOATS:
        expect_dtype(op, name, lead, FLOATS)
    if lead.dim() == 0:
        reject(op, name, "at least one dimension", "a scalar")


def expect_layer(
    op: str,
    lead_name: str,
    lead: torch.Tensor,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | None,
    suffix: str = "",
) -> tuple[int, int, int]:
    """One adapted layer: W (N, K) or absent, A (R, K), B (N, R), s. Returns (N, K, R)."""
    dtype, device = lead.dtype, lead.device
    w_name, a_name, b_name, s_name = (
        name + suffix for name in ("weight", "lora_a", "lora_b", "scaling")
    )
    expect_dense(op, device, **{a_name: lora_a, b_name: lora_b, s_name: scaling})
    assert scaling is not None
    if lora_a.dim() != 2:
        expect_shape(op, a_name, lora_a, ("R", "K"))
    if lora_b.dim() != 2:
        expect_shape(op, b_name, lora_b, ("N", "R"))
    r, k = lora_a.shape
    n = lora_b.shape[0]
    if weight is not None:
        expect_dense(op, device, **{w_name: weight})
        if weight.dim() != 2:
            expect_shape(op, w_name, weight, ("N", "K"))
        n = weight.shape[0]
        if k != weight.shape[1]:
            because = f"to match the columns of {w_name}"
            expect_shape(op, a_name, lora_a, ("R", weight.shape[1]), because)
        if weight.dtype is not dtype:
            expect_dtype(op, w_name, weight, (dtype,), f"to match {lead_name}")
    if r < 1:
        reject(op, a_name, "rank at least 1", r)
    if lora_b.shape != (n, r):
        expect_shape(op, b_name, lora_b, (n, r), "to match weight and lora_a")
    if scaling.numel() != 1:
        reject(op, s_name, "one element", tuple(scaling.shape))

    beside = "beside the first argument"
    if lora_a.dtype is not dtype and lora_a.dtype is not wide(dtype):
        expect_dtype(op, a_name, lora_a, (dtype, wide(dtype)), beside)
    if lora_b.dtype is not lora_a.dtype:
        expect_dtype(op, b_name, lora_b, (lora_a.dtype,), "to match lora_a")
    if scaling.dtype is not wide(dtype):
        expect_dtype(op, s_name, scaling, (wide(dtype),), beside)
    return n, k, r


def expect_dropout(
    op: str, device: torch.device, p: float | Sequence[float], rng: torch.Tensor | None
) -> None:
    """p are probabilities, and rng is there where one of them drops anything."""
    drops = False
    for probability in p if isinstance(p, Sequence) else (p,):
        if not 0.0 <= probability <= 1.0:
            reject(op, "p", "a probability", probability)
        drops = drops or (probability > 0 and dropout_threshold(probability) > 0)
    if rng is not None:
        expect_dense(op, device, rng=rng)
        expect_shape(op, "rng", rng, (2,), "(seed, offset)")
        expect_dtype(op, "rng", rng, (torch.int64,))
    elif drops:
        reject(op, "rng", "type Tensor", "None", because=f"to drop with p = {p}", error=TypeError)


def expect_packed(op: str, device: torch.device, name: str, packed: torch.Tensor) -> None:
    """A packed weight: bytes, whose header the library checks against level and sizes."""
    expect_dense(op, device, **{name: packed})
    expect_dtype(op, name, packed, (torch.uint8,), "as pack_weight gives it")
    if packed.dim() != 1:
        expect_shape(op, name, packed, ("bytes",))


def expect_bias(
    op: str, lead: torch.Tensor, n: int, bias: torch.Tensor, name: str = "bias"
) -> None:
    """b (N,) of the lead\'s dtype."""
    expect_dense(op, lead.device, **{name: bias})
    expect_shape(op, name, bias, (n,), "to match the rows of weight")
    expect_dtype(op, name, bias, (lead.dtype,), "to match x")


def expect_input(
    op: str, x: torch.Tensor | None, leading: torch.Size, k: int, like: torch.Tensor, needed: bool
) -> None:
    """The x that a backward reads for dW and dA."""
    if x is None:
        if needed:
            reject(op, "x", "type Tensor", "None", because="to compute dW or dA", error=TypeError)
        return
    expect_dense(op, like.device, x=x)
    expect_shape(op, "x", x, (*leading, k), "to match grad")
    expect_dtype(op, "x", x, (like.dtype,), "to match grad")
