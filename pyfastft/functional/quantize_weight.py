"""Weights into 4-bit codes."""

from __future__ import annotations

import torch

from pyfastft import ops


def rtn_quantize(
    weight: torch.Tensor,
    *,
    group_size: int = 64,
    codebook: str = "int4",
    symmetric: bool = False,
    grid: int = 20,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    r"""Round-to-nearest with a search of the clipped range, by squared error per group.

    .. math:: \min_p \sum_{j \in \mathrm{group}} (w_j - s_p (c_j - z_p))^2, \quad
        s_p = p \frac{\max(w, 0) - \min(w, 0)}{15}, \quad
        c_j = \mathrm{clamp}(\mathrm{rint}(w_j / s_p) + z_p, 0, 15)

    Args:
        weight: of shape (N, K); float32, bfloat16, float16 or float64.
        group_size: how many weights along K share a scale; K or more is one scale per row.
        codebook: ``"int4"``, ``"nf4"`` or ``"fp4"``; of the last two the scale is p max|w|, and
            the code the nearest value's.
        symmetric: the zero-point is 8 and the scale p max|w| / 7.5; int4 only.
        grid: how many p = 1 - i / (2 grid) are tried; 1 does not clip.
        scale_dtype: what the scale is rounded to before the codes are made: float32, bfloat16, or
            float16, whose values come back in float32.

    Returns:
        codes uint8 (N, ceil(K / 2)), scale (N, ceil(K / group_size)), and zero uint8 of the scale's
        shape, None where it is implied: what :func:`int4_linear` takes.

    Raises:
        ValueError, TypeError: an argument does not fit.

    Note:
        A group with a weight that is not finite has NaN as its scale.

    Reference:
        Choukroun et al. 2019, "Low-bit Quantization of Neural Networks for Efficient Inference",
        section 3.
    """
    codes, scale, zero = ops.rtn_quantize(
        weight.detach(), group_size, codebook, symmetric, grid, scale_dtype
    )
    return codes, scale, zero if codebook == "int4" and not symmetric else None


def hqq_quantize(
    weight: torch.Tensor,
    *,
    group_size: int = 64,
    round_zero: bool = False,
    iterations: int = 20,
    power: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Half-quadratic quantization: a zero-point for the bulk of a group, not its outliers.

    .. math:: \min_z \sum_{j \in \mathrm{group}} |w_j - s (c_j - z)|^p, \quad
        c_j = \mathrm{clamp}(\mathrm{rint}(w_j / s + z), 0, 15)

    solved by turns for the sparse part of the error and for z; the best z of each group is kept.

    Args:
        weight: of shape (N, K); float32, bfloat16, float16 or float64.
        group_size: how many weights along K share a scale; K or more is one scale per row.
        round_zero: put the better one of the two integers around z in its place, for formats that
            store one.
        iterations: how often z is made anew.
        power: p, up to 2.
        beta: the first step's weight of the quadratic term, which each step multiplies by
            ``kappa``.
        scale_dtype: as of :func:`rtn_quantize`; z is rounded to it, too.

    Returns:
        codes uint8 (N, ceil(K / 2)), scale (N, ceil(K / group_size)), and zero of the scale's
        shape: of its dtype, or uint8 with ``round_zero``.

    Raises:
        ValueError, TypeError: an argument does not fit.

    Note:
        A group with a weight that is not finite has NaN as its scale.

    Reference:
        Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
    """
    return ops.hqq_quantize(
        weight.detach(), group_size, round_zero, iterations, power, beta, kappa, scale_dtype
    )
