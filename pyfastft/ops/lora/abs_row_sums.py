"""abs_row_sums: the sums of |U V^T - W| along its rows, the matrix never written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, differentiable, not_differentiable
from pyfastft.ops.lora._operands import expect_lead, wide


@define("(Tensor u, Tensor v, Tensor? w) -> Tensor sums")
def abs_row_sums(u: torch.Tensor, v: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
    """sums_n = sum_k |sum_r u[n, r] v[k, r] - w[n, k]|; u (N, R), v (K, R), w (N, K) or absent.

    One dtype, any strides. Output (N,), float32 (float64 beside float64), accumulated in it.
    """
    op = "abs_row_sums"
    expect_lead(op, "u", u)
    n = _expect_factors(op, u, v, w)[0]
    return _alloc.empty((n,), like=u, dtype=wide(u.dtype))


@define(
    "(Tensor grad, Tensor u, Tensor v, Tensor? w, bool[3] need) -> "
    "(Tensor du, Tensor dv, Tensor dw)"
)
def abs_row_sums_backward(
    grad: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor | None,
    need: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """With Z = sign(U V^T - W) * grad along rows: du = Z V, dv = Z^T U, dw = -Z; sign(0) is 0.

    What is not needed comes back with no elements.
    """
    op = "abs_row_sums_backward"
    expect_lead(op, "u", u)
    n, k = _expect_factors(op, u, v, w)
    expect_dense(op, u.device, grad=grad)
    expect_shape(op, "grad", grad, (n,), "to match the rows of u")
    expect_dtype(op, "grad", grad, (wide(u.dtype),), "beside u")
    if len(need) != 3:
        reject(op, "need", "three flags (u, v, w)", len(need))
    if need[2] and w is None:
        reject(op, "w", "type Tensor", "None", because="to compute dw", error=TypeError)
    return (
        _alloc.empty(u.shape if need[0] else (0,), like=u),
        _alloc.empty(v.shape if need[1] else (0,), like=v),
        _alloc.empty((n, k) if need[2] else (0,), like=u),
    )


def _expect_factors(
    op: str, u: torch.Tensor, v: torch.Tensor, w: torch.Tensor | None
) -> tuple[int, int]:
    expect_dense(op, u.device, v=v)
    expect_shape(op, "u", u, ("N", "R"))
    expect_shape(op, "v", v, ("K", u.shape[1]), "to match the columns of u")
    expect_dtype(op, "v", v, (u.dtype,), "to match u")
    n, k = u.shape[0], v.shape[0]
    if w is not None:
        expect_dense(op, u.device, w=w)
        expect_shape(op, "w", w, (n, k), "to match the rows of u and v")
        expect_dtype(op, "w", w, (u.dtype,), "to match u")
    return n, k


not_differentiable("abs_row_sums_backward")


@differentiable("abs_row_sums")
class AbsRowSumsFunction(torch.autograd.Function):
    """Derivative of :func:`abs_row_sums`; the sub-gradient is 0 where U V^T = W."""

    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        return abs_row_sums.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need = list(ctx.needs_input_grad[:3])
        gradients = abs_row_sums_backward(grad, *ctx.saved_tensors, need)
        return tuple(g if n else None for g, n in zip(gradients, need, strict=True))
