"""int4_linear_a4: weights and activations of 4 bits, multiplied in integers."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import expect_dtype
from pyfastft._op import define, differentiable
from pyfastft.ops.lora._operands import expect_bias, expect_lead
from pyfastft.ops.ptq4._operands import expect_int4
from pyfastft.ops.ptq4.fake_quantize4 import expect_range, fake_quantize4, fake_quantize4_backward
from pyfastft.ops.ptq4.int4_linear_a8 import expect_group
from pyfastft.ops.ptq4.linear import int4_linear_backward


@define(
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, Tensor? perm, "
    "Tensor x_scale, Tensor x_zero, SymInt group_size) -> Tensor y",
    autocast=("x", "bias"),
)
def int4_linear_a4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """y = x^ W^T + b with the x^ of fake_quantize4: 4-bit codes of both sides are multiplied.

    Operands of W as of int4_linear, codebook int4, zero None or uint8; x_scale and x_zero as of
    fake_quantize4. Every backend gives the same bits. A row with a NaN in it is NaN.
    """
    op = "int4_linear_a4"
    expect_lead(op, "x", x)
    k = x.shape[-1]
    n, _ = expect_int4(op, x, codes, scale, zero, perm, k, group_size, "int4")
    expect_group(op, k, group_size)
    if zero is not None:
        expect_dtype(op, "zero", zero, (torch.uint8,), "to multiply codes in integers")
    expect_range(op, x, x_scale, x_zero, perm, group_size)
    if bias is not None:
        expect_bias(op, x, n, bias)
    return _alloc.empty((*x.shape[:-1], n), like=x)


@differentiable("int4_linear_a4")
class Int4LinearA4Function(torch.autograd.Function):
    """Derivative of :func:`int4_linear_a4`: int4_linear's at x^, then fake_quantize4's.

    Saves x; x^ is made again where the gradient of the weight's scale is asked for.
    """

    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        return int4_linear_a4.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, codes, scale, zero, _, perm, x_scale, x_zero, group_size = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, codes, scale, zero, perm, x_scale, x_zero)
        ctx.group_size = group_size

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        needs, group = ctx.needs_input_grad, ctx.group_size
        need_input = [needs[0], needs[6], needs[7]]
        x, codes, scale, zero, perm, x_scale, x_zero = ctx.saved_tensors
        rounded = fake_quantize4(x, x_scale, x_zero, perm, group) if needs[2] else None
        need = [any(need_input), needs[2], False, needs[4]]
        weight = (codes, scale, zero, perm, None, x.shape[-1], group, "int4")
        dx, dscale, _, dbias = int4_linear_backward(grad, rounded, *weight, need)
        inputs: tuple[torch.Tensor | None, ...] = (None, None, None)
        if any(need_input):
            found = fake_quantize4_backward(dx, x, x_scale, x_zero, perm, group, need_input)
            inputs = tuple(g if n else None for g, n in zip(found, need_input, strict=True))
        return (
            *(inputs[0], None, dscale if needs[2] else None, None),
            *(dbias if needs[4] else None, None, inputs[1], inputs[2], None),
        )
