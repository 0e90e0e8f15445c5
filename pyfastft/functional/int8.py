"""Linear layers whose weights are int8."""

from __future__ import annotations

import torch

from pyfastft import ops


def int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""A linear layer whose weight is int8 with one scale per output: what a layer gets that has to
    stay near its precision beside others of 4 bits.

    .. math:: y = x W^T + b, \quad W_{n,k} = s_n \cdot c_{n,k}

    Args:
        x: input of shape (..., K); float32, bfloat16, float16 or float64, any strides.
        codes: c of shape (N, K), int8, any strides.
        scale: s of shape (N,), float32 (float64 beside float64).
        bias: b of shape (N,), of x's dtype.

    Returns:
        y of shape (..., N), of x's dtype, accumulated in float32 (float64 for float64). Codes are
        exact in every dtype of x and are multiplied unscaled; the scale multiplies the sum.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.
        NotImplementedError: no backend can run the arguments; lists every backend's reason.

    Note:
        Gradients go to x, the scale and the bias. Deterministic, and on CPU independent of the
        number of threads. The backward saves x only for the scale's gradient; it cannot be
        differentiated again.

    Reference:
        Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets": the
        8-bit choice of its bit allocation.
    """
    return ops.int8_linear(x, codes, scale, bias)
