"""fake_quantize4: activations rounded to 4 bits within a learned range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, differentiable, not_differentiable
from pyfastft.ops.lora._operands import expect_lead, wide


@define(
    "(Tensor x, Tensor x_scale, Tensor x_zero, Tensor? perm, SymInt group_size) -> Tensor y",
    autocast=("x",),
)
def fake_quantize4(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    perm: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """y = s * (clamp(round(x / s) + z, 0, 15) - z), z being x_zero rounded and clamped to 0..15.

    x (..., K) of any strides. x_scale and x_zero have one element, or one for each group of
    ``group_size`` features, G = ceil(K / group_size), feature perm[j] being in group j //
    group_size; float32, float64 beside float64. A group whose scale is not positive, or whose zero
    is no number, gives NaN.
    """
    op = "fake_quantize4"
    expect_lead(op, "x", x)
    expect_range(op, x, x_scale, x_zero, perm, group_size)
    return _alloc.empty(x.shape, like=x)


@define(
    "(Tensor grad, Tensor x, Tensor x_scale, Tensor x_zero, Tensor? perm, SymInt group_size, "
    "bool[3] need) -> (Tensor dx, Tensor dscale, Tensor dzero)"
)
def fake_quantize4_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    perm: torch.Tensor | None,
    group_size: int,
    need: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The gradients of fake_quantize4 that ``need`` names, straight through its roundings.

    With u = x / s + z: dx = grad where 0 <= u <= 15, else 0; dscale = sum of grad * (round(x / s) -
    x / s) inside, grad * (-z) below, grad * (15 - z) above; dzero = sum of -s * grad outside, and 0
    where x_zero is itself outside 0..15. What is not needed comes back with no elements.
    """
    op = "fake_quantize4_backward"
    expect_lead(op, "x", x)
    expect_range(op, x, x_scale, x_zero, perm, group_size)
    expect_dense(op, x.device, grad=grad)
    expect_shape(op, "grad", grad, x.shape, "to match x")
    expect_dtype(op, "grad", grad, (x.dtype,), "to match x")
    if len(need) != 3:
        reject(op, "need", "three flags (x, x_scale, x_zero)", len(need))
    return (
        _alloc.empty(x.shape if need[0] else (0,), like=x),
        _alloc.empty(x_scale.shape if need[1] else (0,), like=x_scale),
        _alloc.empty(x_zero.shape if need[2] else (0,), like=x_zero),
    )


def expect_range(
    op: str,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    perm: torch.Tensor | None,
    group_size: int,
) -> None:
    """The learned range of x (..., K): one for all, or one for each group of features."""
    expect_dense(op, x.device, x_scale=x_scale, x_zero=x_zero)
    if group_size < 1:
        reject(op, "group_size", "at least 1", group_size)
    k = x.shape[-1]
    groups = -(-k // group_size)
    if x_scale.shape != (1,) and x_scale.shape != (groups,):
        what, got = f"shape (1,) or ({groups},)", tuple(x_scale.shape)
        reject(op, "x_scale", what, got, because=f"to have groups of {group_size} of K = {k}")
    expect_shape(op, "x_zero", x_zero, x_scale.shape, "to match x_scale")
    for name, value in (("x_scale", x_scale), ("x_zero", x_zero)):
        expect_dtype(op, name, value, (wide(x.dtype),), "beside x")
    if perm is not None:
        expect_dense(op, x.device, perm=perm)
        expect_shape(op, "perm", perm, (k,), "to name the input feature of every code")
        expect_dtype(op, "perm", perm, (torch.int32,))


not_differentiable("fake_quantize4_backward")


@differentiable("fake_quantize4")
class FakeQuantize4Function(torch.autograd.Function):
    """Derivative of :func:`fake_quantize4`: straight through the roundings, as LSQ+ has it."""

    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        return fake_quantize4.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, x_scale, x_zero, perm, group_size = inputs
        ctx.save_for_backward(x, x_scale, x_zero, perm)
        ctx.group_size = group_size

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need = list(ctx.needs_input_grad[:3])
        gradients = fake_quantize4_backward(grad, *ctx.saved_tensors, ctx.group_size, need)
        return (*(g if n else None for g, n in zip(gradients, need, strict=True)), None, None)
