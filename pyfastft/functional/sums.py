"""Sums over a product of factors that is never written."""

from __future__ import annotations

import torch

from pyfastft import ops


def abs_row_sums(u: torch.Tensor, v: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
    r"""The sums along the rows of a matrix's absolute values, without the matrix.

    .. math:: \mathrm{sums}_n = \sum_k \left| \sum_r u_{nr} v_{kr} - w_{nk} \right|

    PEGO's losses are sums of these: :math:`|W (B A)^T|_1` with ``u = W A^T`` and ``v = B``, and
    :math:`|(B_i A_i) (B_j A_j)^T|_1` with ``u = B_i (A_i A_j^T)`` and ``v = B_j``.

    Args:
        u: of shape (N, R); float32, bfloat16, float16 or float64, any strides.
        v: of shape (K, R), of u's dtype.
        w: of shape (N, K), of u's dtype; absent, it is zero.

    Returns:
        sums of shape (N,), float32 (float64 beside float64). Differentiable in u, v and w; the
        sub-gradient is 0 where a difference is.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`pyfastft.lora_linear`.

    Reference:
        Hu et al. 2024, "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal
        Regularization for Domain Generalization", equations 5 and 6.
    """
    return ops.abs_row_sums(u, v, w)
