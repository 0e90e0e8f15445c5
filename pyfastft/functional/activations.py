"""Layers of 4-bit weights whose activations are quantized too, and the quantizer of 4 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from pyfastft import ops
from pyfastft._check import expect_dense, expect_shape, reject
from pyfastft.ops.lora._operands import wide


def int4_linear_a8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    perm: torch.Tensor | None = None,
    group_size: int,
) -> torch.Tensor:
    r"""A linear layer whose weight has 4 bits, with activations rounded to 8 bits on the way:
    faster than :func:`pyfastft.functional.int4_linear` from some rows on, and less exact.

    .. math:: y = \hat x W^T + b, \quad \hat x_{m,g} = s_{m,g} \,\mathrm{round}(x_{m,g} / s_{m,g}),
        \quad s_{m,g} = \max |x_{m,g}| / 127

    Args:
        x: input of shape (..., K); float32, bfloat16, float16 or float64, any strides.
        codes, scale, zero, perm, group_size: the weight W, see
            :func:`pyfastft.functional.int4_dequantize`; its groups are those of x.
        bias: b of shape (N,), of x's dtype.

    Returns:
        y of shape (..., N), of x's dtype. Products are exact integers, groups are added up in
        float32 (float64 for float64). A row with a NaN or an infinity in it is NaN.

    Raises:
        ValueError: a shape, device or size does not fit, or perm is no permutation.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.
        RuntimeError: on CPU, a zero of uint8 is more than 15.
        NotImplementedError: no backend can run the arguments; lists every backend's reason.

    Note:
        The same bits on every backend, at every level of the instruction set, with any number of
        threads. Gradients are those of int4_linear, straight through the rounding of x.

    Reference:
        Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons", for
        the gradient; Yao et al. 2022, "ZeroQuant", section 4.1, for scales found on the way.
    """
    return ops.int4_linear_a8(x, codes, scale, zero, bias, perm, group_size)


def int4_linear_a4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    x_scale: float | torch.Tensor,
    x_zero: float | torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    perm: torch.Tensor | None = None,
    group_size: int,
) -> torch.Tensor:
    r"""A linear layer of 4-bit weights and 4-bit activations, multiplied as integers, the
    activations within a learned range: AdaQuant's layer.

    .. math:: y = \hat x W^T + b, \quad
        \hat x = s \left(\mathrm{clamp}(\mathrm{round}(x / s) + z, 0, 15) - z\right)

    Args:
        x: input of shape (..., K); float32, bfloat16, float16 or float64, any strides.
        codes, scale, zero, perm, group_size: the weight W, see
            :func:`pyfastft.functional.int4_dequantize`; zero is absent or uint8.
        x_scale, x_zero: s and z, see :func:`fake_quantize4`.
        bias: b of shape (N,), of x's dtype.

    Returns:
        y of shape (..., N), of x's dtype: int4_linear of ``fake_quantize4(x)``, but its products
        are exact. A row with a NaN in it is NaN; an infinity is the end of the range.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: as :func:`int4_linear_a8`.

    Note:
        The same bits on every backend, at every level of the instruction set, with any number of
        threads. Gradients go to x, x_scale and x_zero as of :func:`fake_quantize4`, to scale and
        bias as of int4_linear.

    Reference:
        Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets",
        equation 2.
    """
    ranges = _range(x_scale, x), _range(x_zero, x)
    return ops.int4_linear_a4(x, codes, scale, zero, bias, perm, *ranges, group_size)


def fake_quantize4(
    x: torch.Tensor,
    x_scale: float | torch.Tensor,
    x_zero: float | torch.Tensor,
    *,
    perm: torch.Tensor | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    r"""Activations rounded to 4 bits within a learned range.

    .. math:: \hat x = s \left(\mathrm{clamp}(\mathrm{round}(x / s) + z, 0, 15) - z\right)

    Args:
        x: of shape (..., K); float32, bfloat16, float16 or float64, any strides.
        x_scale: s > 0, one number for all of x, or of shape (G,) one for each group of features;
            float32 (float64 beside float64).
        x_zero: z, of x_scale's shape and dtype. It is rounded, and clamped to 0..15.
        perm: int32 of shape (K,): feature perm[j] is in group j // group_size. Absent, they are in
            order.
        group_size: how many features share a range; absent, all do.

    Returns:
        Of x's shape and dtype; the same bits on every backend.

    Raises:
        ValueError: a shape, device or size does not fit, or perm is no permutation.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.
        NotImplementedError: no backend can run the arguments; lists every backend's reason.

    Note:
        Gradients are straight through the roundings. That of x is dy where x / s + z is in 0..15,
        else 0; s gets dy * (round(x / s) - x / s) inside, -z * dy below and (15 - z) * dy above;
        z gets -s * dy from outside, unless it is clamped itself. Step sizes of learned ranges are
        the optimizer's affair: no factor is put on these gradients.

    Reference:
        Esser et al. 2020, "Learned Step Size Quantization", equations 1 to 3; Bhalgat et al. 2020,
        "LSQ+", equation 4, for z; Hubara et al. 2021 round and clamp it.
    """
    group = max(x.shape[-1], 1) if group_size is None else group_size
    return ops.fake_quantize4(x, _range(x_scale, x), _range(x_zero, x), perm, group)


def int4_conv2d_a4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    kernel_size: int | Sequence[int],
    x_scale: float | torch.Tensor,
    x_zero: float | torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    group_size: int,
) -> torch.Tensor:
    r"""A convolution of two dimensions with 4-bit weights and 4-bit activations: columns of x
    (im2col), and :func:`int4_linear_a4` of them.

    .. math:: y = \hat x * W + b

    Args:
        x: of shape (B, C, H, W).
        codes, scale, zero, group_size: the weight, of K = C times the kernel's size columns as
            ``weight.flatten(1)`` has them, see :func:`pyfastft.functional.int4_dequantize`.
        kernel_size: of the convolution.
        x_scale, x_zero: s and z, one number each: padding with zeros is exact, since 0 has a code.
        bias: b of shape (N,), of x's dtype.
        stride, padding, dilation: as of :func:`torch.nn.functional.conv2d`, without its words for
            padding.

    Returns:
        y of shape (B, N, H', W'), of x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: as :func:`int4_linear_a4`; what
            torch's unfold refuses is a RuntimeError of torch's.

    Note:
        The columns hold every element of x as often as the kernel visits it, in x's dtype.

    Reference:
        Hubara et al. 2021, as of :func:`int4_linear_a4`.
    """
    op = "int4_conv2d_a4"
    expect_dense(op, None, x=x)
    expect_shape(op, "x", x, ("B", "C", "H", "W"))
    kernel, step, pad, dilated = (
        _pair(op, *named)
        for named in (
            ("kernel_size", kernel_size),
            ("stride", stride),
            ("padding", padding),
            ("dilation", dilation),
        )
    )
    columns = F.unfold(x, kernel, dilated, pad, step).transpose(1, 2)
    y = int4_linear_a4(
        columns,
        codes,
        scale,
        x_scale=x_scale,
        x_zero=x_zero,
        zero=zero,
        bias=bias,
        group_size=group_size,
    )
    height, width = (
        (x.shape[2 + i] + 2 * pad[i] - dilated[i] * (kernel[i] - 1) - 1) // step[i] + 1
        for i in range(2)
    )
    return y.transpose(1, 2).reshape(len(x), len(codes), height, width)


def _range(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A range's number as the tensor that an op takes."""
    if isinstance(value, torch.Tensor):
        return value.reshape(1) if value.dim() == 0 else value
    return torch.full((1,), value, dtype=wide(like.dtype), device=like.device)


def _pair(op: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        reject(op, name, "one size or two", value)
    return value[0], value[1]
