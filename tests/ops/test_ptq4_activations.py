"""Quantized activations and int8 weights: what they compute, in other words than the reference's,
and the gradients that pass straight through roundings."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import pyfastft as ft
from pyfastft import functional as ff
from pyfastft.testing.tolerance import assert_exact, error


def weight(n: int, k: int, group: int, dtype: torch.dtype = torch.float64) -> dict:
    codes = torch.randint(256, (n, -(-k // 2)), dtype=torch.uint8)
    shape = (n, -(-k // group))
    scale = torch.rand(shape, dtype=dtype) * k**-0.5 + 0.01
    zero = torch.randint(16, shape, dtype=torch.uint8)
    return {"codes": codes, "scale": scale, "zero": zero, "group_size": group}


class _Round(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad


def adaquant(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """As AdaQuant's code has it: the zero rounded and clamped, the value clamped and rounded; by
    torch's own autograd."""
    z = _Round.apply(zero).clamp(0, 15)
    return (_Round.apply((x / scale + z).clamp(0, 15)) - z) * scale


@pytest.mark.parametrize("groups", [1, 4])
def test_the_gradients_of_a_learned_range_are_adaquants(groups: int) -> None:
    group = 16
    x = (2 * torch.randn(23, 64, dtype=torch.float64)).requires_grad_()
    scale = (torch.rand(groups, dtype=torch.float64) * 0.1 + 0.1).requires_grad_()
    zero = torch.tensor([7.3, -2.0, 3.2, 14.9], dtype=torch.float64)[:groups].requires_grad_()
    grad = torch.randn(23, 64, dtype=torch.float64)
    each = [t.repeat_interleave(group)[:64] if groups > 1 else t for t in (scale, zero)]
    expected = adaquant(x, *each)
    actual = ff.fake_quantize4(x, scale, zero, group_size=group)
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected, (x, scale, zero), grad)
    for a, e in zip(torch.autograd.grad(actual, (x, scale, zero), grad), wanted, strict=True):
        torch.testing.assert_close(a, e)


def test_a4_is_the_linear_layer_of_both_sides_rounded() -> None:
    n, k = 11, 48
    w = weight(n, k, 16)
    w["scale"].requires_grad_()
    x = torch.randn(9, k, dtype=torch.float64).requires_grad_()
    scale = torch.full((1,), 0.2, dtype=torch.float64).requires_grad_()
    zero = torch.full((1,), 6.8, dtype=torch.float64).requires_grad_()
    bias = torch.randn(n, dtype=torch.float64).requires_grad_()
    leaves = (x, w["scale"], scale, zero, bias)
    actual = ff.int4_linear_a4(x, **w, x_scale=scale, x_zero=zero, bias=bias)
    rounded = adaquant(x, scale, zero)
    codes = torch.stack((w["codes"] & 15, w["codes"] >> 4), -1).flatten(1).double()
    zeros, scales = (w[name].repeat_interleave(16, 1).double() for name in ("zero", "scale"))
    expected = F.linear(rounded, (codes - zeros) * scales, bias)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(actual)
    wanted = torch.autograd.grad(expected, leaves, grad)
    for a, e in zip(torch.autograd.grad(actual, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(a, e)


def test_a8_is_near_the_linear_layer_and_has_its_gradient() -> None:
    w = weight(40, 256, 64, torch.float32)
    x = torch.randn(30, 256).requires_grad_()
    exact, rounded = ff.int4_linear(x, **w), ff.int4_linear_a8(x, **w)
    noise = (rounded - exact).square().mean() / exact.square().mean()
    assert 10 * noise.log10() < -35  # dB: 8 bits of a normal distribution
    assert not torch.equal(rounded, exact)
    grad = torch.randn_like(exact)
    assert_exact(*(torch.autograd.grad(y, x, grad)[0] for y in (rounded, exact)), "dx")


def test_one_outlier_costs_its_own_group_alone() -> None:
    w = weight(20, 128, 32, torch.float32)
    x = torch.randn(4, 128)
    y = ff.int4_linear_a8(x, **w)
    spoiled = x.clone()
    spoiled[:, 5] = 1e4
    matrix = ff.int4_dequantize(
        w["codes"], w["scale"], zero=w["zero"], group_size=32, dtype=torch.float32
    )
    kept = (spoiled[:, 32:] @ matrix[:, 32:].T).double()
    group = (spoiled[:, :32] @ matrix[:, :32].T).double()
    spoiled_y = ff.int4_linear_a8(spoiled, **w)
    assert error(spoiled_y, kept + group) < 1e4 / 127 * 32 * float(matrix.abs().max())
    assert y.shape == spoiled_y.shape


def test_int8_is_the_linear_layer_of_the_scaled_codes() -> None:
    codes = torch.randint(-128, 128, (7, 30), dtype=torch.int8)
    x = torch.randn(2, 5, 30, dtype=torch.float64).requires_grad_()
    scale = torch.rand(7, dtype=torch.float64).requires_grad_()
    bias = torch.randn(7, dtype=torch.float64).requires_grad_()
    actual = ff.int8_linear(x, codes, scale, bias=bias)
    expected = F.linear(x, codes * scale[:, None], bias)
    torch.testing.assert_close(actual, expected)
    grad, leaves = torch.randn_like(actual), (x, scale, bias)
    wanted = torch.autograd.grad(expected, leaves, grad)
    for a, e in zip(torch.autograd.grad(actual, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [(3, {"padding": 1}), ((2, 3), {"stride": (2, 1), "dilation": 2, "padding": (0, 2)}), (1, {})],
)
def test_a_convolution_is_that_of_both_sides_rounded(kernel: object, options: dict) -> None:
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    k = 4 * size[0] * size[1]
    w = weight(6, k, 8)
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64).requires_grad_()
    matrix = ff.int4_dequantize(
        w["codes"], w["scale"], zero=w["zero"], k=k, group_size=8, dtype=torch.float64
    )
    rounded = ff.fake_quantize4(x.flatten(1), 0.25, 7.0).view_as(x)
    expected = F.conv2d(rounded, matrix.view(6, 4, *size), **options)
    actual = ff.int4_conv2d_a4(x, **w, kernel_size=kernel, x_scale=0.25, x_zero=7.0, **options)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(actual)
    wanted = torch.autograd.grad(expected, x, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(actual, x, grad)[0], wanted)


def test_a_convolution_refuses_other_dimensions() -> None:
    w = weight(6, 8, 8)
    call = {"x_scale": 1.0, "x_zero": 0.0, "kernel_size": 1, **w}
    with pytest.raises(ValueError, match=r"int4_conv2d_a4: expected x of shape \(B, C, H, W\)"):
        ff.int4_conv2d_a4(torch.ones(8, 3, 3), **call)
    with pytest.raises(ValueError, match="int4_conv2d_a4: expected stride of one size or two"):
        ff.int4_conv2d_a4(torch.ones(1, 8, 3, 3), **call, stride=(1, 1, 1))


def test_what_runs_is_explained() -> None:
    w = weight(6, 8, 8, torch.float32)
    explained = ft.explain(ff.int4_linear_a8, torch.ones(2, 8), **w, bias=None, perm=None)
    assert explained.chosen in ("cpu", "reference")
