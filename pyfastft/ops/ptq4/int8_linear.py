"""int8_linear: a linear layer whose weight is int8, with one scale per output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, differentiable, not_differentiable
from pyfastft.ops.lora._operands import expect_bias, expect_lead, wide


@define(
    "(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor y",
    autocast=("x", "bias"),
)
def int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + b with W[n, k] = scale[n] * codes[n, k]; the output is C-contiguous.

    x (..., K) and codes (N, K), int8, have any strides; scale (N,) is float32, float64 beside a
    float64 x; b (N,) has x's dtype. Codes meet x unscaled, and the scale multiplies the sum.
    """
    op = "int8_linear"
    expect_lead(op, "x", x)
    n, k = _expect_weight(op, x, codes, scale)
    expect_shape(op, "x", x, (*x.shape[:-1], k), "to match the columns of codes")
    if bias is not None:
        expect_bias(op, x, n, bias)
    return _alloc.empty((*x.shape[:-1], n), like=x)


@define(
    "(Tensor grad, Tensor? x, Tensor codes, Tensor scale, bool[3] need) -> "
    "(Tensor dx, Tensor dscale, Tensor dbias)"
)
def int8_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    need: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The gradients of int8_linear that ``need`` names, in the order x, scale, b.

    What is not needed comes back with no elements. x is read for the gradient of scale, and may be
    absent elsewhere.
    """
    op = "int8_linear_backward"
    expect_lead(op, "grad", grad)
    n, k = _expect_weight(op, grad, codes, scale)
    leading = grad.shape[:-1]
    expect_shape(op, "grad", grad, (*leading, n), "to match the rows of codes")
    if len(need) != 3:
        reject(op, "need", "three flags (x, scale, b)", len(need))
    if x is None:
        if need[1]:
            because = "to compute the gradient of scale"
            reject(op, "x", "type Tensor", "None", because=because, error=TypeError)
    else:
        expect_dense(op, grad.device, x=x)
        expect_shape(op, "x", x, (*leading, k), "to match grad")
        expect_dtype(op, "x", x, (grad.dtype,), "to match grad")
    return (
        _alloc.empty((*leading, k) if need[0] else (0,), like=grad),
        _alloc.empty(scale.shape if need[1] else (0,), like=scale),
        _alloc.empty((n,) if need[2] else (0,), like=grad),
    )


def _expect_weight(
    op: str, lead: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
) -> tuple[int, int]:
    expect_dense(op, lead.device, codes=codes, scale=scale)
    expect_dtype(op, "codes", codes, (torch.int8,))
    expect_shape(op, "codes", codes, ("N", "K"))
    n, k = codes.shape
    expect_shape(op, "scale", scale, (n,), "to match the rows of codes")
    expect_dtype(op, "scale", scale, (wide(lead.dtype),), "beside the first argument")
    return n, k


not_differentiable("int8_linear_backward")


@differentiable("int8_linear")
class Int8LinearFunction(torch.autograd.Function):
    """Derivative of :func:`int8_linear`; saves x only where the gradient of scale is asked for."""

    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        return int8_linear.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, codes, scale, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, codes, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 4
        needs = ctx.needs_input_grad
        need = [needs[0], needs[2], needs[3]]
        gradients = int8_linear_backward(grad, *ctx.saved_tensors, need)
        dx, dscale, dbias = (g if n else None for g, n in zip(gradients, need, strict=True))
        return dx, None, dscale, dbias
