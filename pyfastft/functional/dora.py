"""Weight-decomposed adaptation: the rows of the adapted weight given a length of their own."""

from __future__ import annotations

import torch

from pyfastft import ops
from pyfastft._check import expect_dense, expect_shape
from pyfastft.functional._arguments import as_scaling
from pyfastft.functional.linear import lora_linear


def dora_norm(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scaling: float | torch.Tensor = 1.0,
    squared: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""The norms of the rows of an adapted weight, which is never made.

    .. math:: \mathrm{norm}_n^2 = |W_n|^2 + 2 s\, ((W A^T) \odot B)_n \mathbf{1}
        + s^2\, ((B (A A^T)) \odot B)_n \mathbf{1} = |W_n + s\, (B A)_n|^2

    Args:
        weight: W of shape (N, K), any strides.
        lora_a: A of shape (R, K), of W's dtype, or float32 beside a half-precision W.
        lora_b: B of shape (N, R), of A's dtype.
        scaling: s.
        squared: |W_n|^2 of shape (N,), float32 (float64 beside float64): a frozen W has the same
            ones in every call.

    Returns:
        norm of shape (N,), float32 (float64 beside float64). Not differentiable, as DoRA asks.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`lora_linear`.

    Reference:
        Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5.
    """
    with torch.no_grad():
        return ops.dora_norm(
            *(t.detach() for t in (weight, lora_a, lora_b, as_scaling(scaling, weight))), squared
        )


def scale_columns(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    r"""A scale and a bias along the last dimension, rounded once.

    .. math:: y_{mn} = x_{mn} g_n + b_n

    Args:
        x: of shape (..., N), any strides.
        scale: g of shape (N,), float32 (float64 beside float64).
        bias: b of shape (N,), of x's dtype.

    Returns:
        y of shape (..., N), of x's dtype.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`lora_linear`.

    Reference:
        Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5.
    """
    return ops.scale_columns(x, scale, bias)


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scaling: float | torch.Tensor = 1.0,
    p: float = 0.0,
    rng: torch.Tensor | None = None,
    squared: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    packed_dx: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""A linear layer with a low-rank update and its rows' lengths trained apart.

    .. math:: y = g \odot (x W^T + s \cdot \mathrm{dropout}_p(x) A^T B^T) + b,
        \quad g_n = \frac{m_n}{|W_n + s\, (B A)_n|}

    The norm is a constant in the backward (section 4.3 of the paper): no gradient of A, B or s
    passes through it.

    Args:
        x: input of shape (..., K).
        weight: W of shape (N, K), of x's dtype.
        lora_a: A of shape (R, K).
        lora_b: B of shape (N, R).
        magnitude: m of shape (N,); used in float32 (float64 beside float64). It starts as the norm
            of W's rows.
        bias: b of shape (N,), of x's dtype; not scaled.
        scaling: s.
        p: dropout probability of the low-rank path's input. PEFT drops the base's input too and
            adds (g - 1) of both to the plain base: for p > 0 it computes something else.
        rng: as in :func:`lora_linear`.
        squared: |W_n|^2, as in :func:`dora_norm`, for a W that is frozen;
            :class:`pyfastft.nn.RowSquares` keeps them.
        packed, packed_dx: W packed, as in :func:`lora_linear`.

    Returns:
        y of shape (..., N), of x's dtype.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`lora_linear`.

    Reference:
        Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equations 5 and 11.
    """
    op = "dora_linear"
    expect_dense(op, x.device, magnitude=magnitude)
    norm = dora_norm(weight, lora_a, lora_b, scaling=scaling, squared=squared)
    expect_shape(op, "magnitude", magnitude, norm.shape, "to match the rows of weight")
    y = lora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        scaling=scaling,
        p=p,
        rng=rng,
        packed=packed,
        packed_dx=packed_dx,
    )
    return scale_columns(y, magnitude.to(norm.dtype) / norm, bias)
