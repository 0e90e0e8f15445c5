"""int4_linear: a linear layer whose weight has 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, differentiable, not_differentiable
from pyfastft.ops.lora._operands import expect_bias, expect_lead
from pyfastft.ops.ptq4._operands import expect_int4, expect_int4_packed, expect_trainable

_NEEDS = 4


@define(
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, Tensor? perm, "
    "Tensor? packed, SymInt group_size, str codebook) -> Tensor y",
    autocast=("x", "bias"),
)
def int4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
) -> torch.Tensor:
    """y = x W^T + b with the W (N, K) of int4_dequantize, which is not built.

    x (..., K) of any strides; b (N,) has x's dtype; operands of W as in ``ptq4.md``. ``packed``:
    the codes as the backend wants them, or None.
    """
    op = "int4_linear"
    expect_lead(op, "x", x)
    k = x.shape[-1]
    n, _ = expect_int4(op, x, codes, scale, zero, perm, k, group_size, codebook)
    if bias is not None:
        expect_bias(op, x, n, bias)
    expect_int4_packed(op, codes, packed)
    return _alloc.empty((*x.shape[:-1], n), like=x)


@define(
    "(Tensor grad, Tensor? x, Tensor codes, Tensor scale, Tensor? zero, Tensor? perm, "
    "Tensor? packed, SymInt k, SymInt group_size, str codebook, bool[4] need) -> "
    "(Tensor dx, Tensor dscale, Tensor dzero, Tensor dbias)"
)
def int4_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
    need: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The gradients of int4_linear that ``need`` names, in the order x, scale, zero, b.

    What is not needed comes back with no elements. x is read for the gradients of scale and zero,
    and may be absent elsewhere.
    """
    op = "int4_linear_backward"
    expect_lead(op, "grad", grad)
    n, _ = expect_int4(op, grad, codes, scale, zero, perm, k, group_size, codebook)
    leading = grad.shape[:-1]
    expect_shape(op, "grad", grad, (*leading, n), "to match the rows of codes")
    if len(need) != _NEEDS:
        reject(op, "need", "four flags (x, scale, zero, b)", len(need))
    expect_trainable(op, zero, need[2])
    expect_activation(op, x, leading, k, grad, need[1] or need[2])
    expect_int4_packed(op, codes, packed)
    return (
        _alloc.empty((*leading, k) if need[0] else (0,), like=grad),
        _alloc.empty(scale.shape if need[1] else (0,), like=scale),
        _alloc.empty(scale.shape if need[2] else (0,), like=scale),
        _alloc.empty((n,) if need[3] else (0,), like=grad),
    )


def expect_activation(
    op: str, x: torch.Tensor | None, leading: torch.Size, k: int, grad: torch.Tensor, needed: bool
) -> None:
    """The x that a backward reads for the gradients of scale and zero."""
    if x is None:
        if needed:
            because = "to compute the gradient of scale or zero"
            reject(op, "x", "type Tensor", "None", because=because, error=TypeError)
        return
    expect_dense(op, grad.device, x=x)
    expect_shape(op, "x", x, (*leading, k), "to match grad")
    expect_dtype(op, "x", x, (grad.dtype,), "to match grad")


not_differentiable("int4_linear_backward")


@differentiable("int4_linear")
class Int4LinearFunction(torch.autograd.Function):
    """Derivative of :func:`int4_linear`; ``apply`` takes its arguments and returns y.

    Saves x only where the gradient of scale or zero will be asked for; codes, scale, zero, perm and
    the packed codes are the layer's own.
    """

    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        return int4_linear.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, codes, scale, zero, _, perm, packed, group_size, codebook = inputs
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad
        kept = x if needs[2] or needs[3] else None
        ctx.save_for_backward(kept, codes, scale, zero, perm, packed)
        ctx.k, ctx.group_size, ctx.codebook = x.shape[-1], group_size, codebook

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        needs = ctx.needs_input_grad
        need = [needs[0], needs[2], needs[3], needs[4]]
        x, codes, scale, zero, perm, packed = ctx.saved_tensors
        gradients = int4_linear_backward(
            *(grad, x, codes, scale, zero, perm, packed),
            *(ctx.k, ctx.group_size, ctx.codebook, need),
        )
        dx, dscale, dzero, dbias = (g if n else None for g, n in zip(gradients, need, strict=True))
        return dx, None, dscale, dzero, dbias, None, None, None, None
