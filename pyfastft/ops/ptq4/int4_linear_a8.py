"""int4_linear_a8: a 4-bit weight times activations that are rounded to 8 bits on the way."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import reject
from pyfastft._op import define, differentiable
from pyfastft.ops.lora._operands import expect_bias, expect_lead
from pyfastft.ops.ptq4._operands import expect_int4
from pyfastft.ops.ptq4.linear import int4_linear_backward

# A group's products are added up in 32 bits: 2^20 times 127 times 15 fit.
MOST_OF_GROUP = 1 << 20


@define(
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, Tensor? perm, "
    "SymInt group_size) -> Tensor y",
    autocast=("x", "bias"),
)
def int4_linear_a8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """y = x^ W^T + b, x^ being x with every group of a row rounded to 8 bits, symmetric.

    Groups are the weight's: s[m, g] = max |x[m, perm[j]]| / 127 over its j, and q = round(x / s) is
    multiplied in integers. Operands as of int4_linear, codebook int4; every backend gives the same
    bits. A row with a NaN or an infinity in it is NaN.
    """
    op = "int4_linear_a8"
    expect_lead(op, "x", x)
    k = x.shape[-1]
    n, _ = expect_int4(op, x, codes, scale, zero, perm, k, group_size, "int4")
    expect_group(op, k, group_size)
    if bias is not None:
        expect_bias(op, x, n, bias)
    return _alloc.empty((*x.shape[:-1], n), like=x)


def expect_group(op: str, k: int, group_size: int) -> None:
    """A group that sums in 32 bits can hold."""
    if group_size > MOST_OF_GROUP and k > MOST_OF_GROUP:
        because = "to sum products of bytes in 32 bits"
        reject(op, "group_size", f"at most {MOST_OF_GROUP}", group_size, because=because)


@differentiable("int4_linear_a8")
class Int4LinearA8Function(torch.autograd.Function):
    """Derivative of :func:`int4_linear_a8`: that of int4_linear at x, straight through the rounding
    of the activations (Bengio et al. 2013)."""

    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        return int4_linear_a8.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, codes, scale, zero, _, perm, group_size = inputs
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[2] or needs[3] else None, codes, scale, zero, perm)
        ctx.k, ctx.group_size = x.shape[-1], group_size

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        needs = ctx.needs_input_grad
        need = [needs[0], needs[2], needs[3], needs[4]]
        gradients = int4_linear_backward(
            grad, *ctx.saved_tensors, None, ctx.k, ctx.group_size, "int4", need
        )
        dx, dscale, dzero, dbias = (g if n else None for g, n in zip(gradients, need, strict=True))
        return dx, None, dscale, dzero, dbias, None, None
