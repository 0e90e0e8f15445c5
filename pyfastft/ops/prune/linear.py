"""block_sparse_linear: a linear layer whose weight is made of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import FLOATS, expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, differentiable, not_differentiable
from pyfastft.ops.prune._pattern import expect_size, expect_values

_NEEDS = 3


def _expect_lead(op: str, name: str, lead: torch.Tensor) -> None:
    """The operand whose dtype and device all others follow."""
    expect_dense(op, None, **{name: lead})
    expect_dtype(op, name, lead, FLOATS)
    if lead.dim() == 0:
        reject(op, name, "at least one dimension", "a scalar")


@define(
    "(Tensor x, Tensor values, Tensor? bias, Tensor index, SymInt n) -> Tensor y",
    autocast=("x", "values", "bias"),
)
def block_sparse_linear(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor, n: int
) -> torch.Tensor:
    """y = x W^T + b, W (N, K) the blocks ``values`` at the places of ``index``, zero elsewhere.

    x (..., K), values (blocks, rows, columns) and b (N,) have one dtype and any strides; index
    (3 blocks + 2 (R + C + 1),), int32, is that of ``_pattern.py`` on an R x C grid. What of the
    last blocks lies beyond W is not read. Output (..., N), C-contiguous.
    """
    op = "block_sparse_linear"
    _expect_lead(op, "x", x)
    expect_values(op, "x", x, values)
    if n < 0:
        reject(op, "n", "at least 0", n)
    expect_size(op, index, values, n, x.shape[-1])
    if bias is not None:
        expect_dense(op, x.device, bias=bias)
        expect_shape(op, "bias", bias, (n,), "to match n")
        expect_dtype(op, "bias", bias, (x.dtype,), "to match x")
    return _alloc.empty((*x.shape[:-1], n), like=x)


def _gradients(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    values: torch.Tensor,
    index: torch.Tensor,
    k: int,
    need: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The outputs of :func:`block_sparse_linear_backward`; those not needed have no elements."""
    return (
        _alloc.empty((*grad.shape[:-1], k) if need[0] else (0,), like=grad),
        _alloc.empty(values.shape if need[1] else (0,), like=grad),
        _alloc.empty((grad.shape[-1],) if need[2] else (0,), like=grad),
    )


@define(
    "(Tensor grad, Tensor? x, Tensor values, Tensor index, SymInt k, bool[3] need) -> "
    "(Tensor dx, Tensor dvalues, Tensor dbias)",
    allocate=_gradients,
)
def block_sparse_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    values: torch.Tensor,
    index: torch.Tensor,
    k: int,
    need: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The gradients of block_sparse_linear that ``need`` names, in the order x, values, b.

    dX = dY W; dvalues = dY^T X at the blocks that there are, zero beyond W; db = sum_m dY. What is
    not needed comes back with no elements. x is read for dvalues and may be absent without.
    """
    op = "block_sparse_linear_backward"
    _expect_lead(op, "grad", grad)
    expect_values(op, "grad", grad, values)
    if len(need) != _NEEDS:
        reject(op, "need", "three flags (x, values, b)", len(need))
    if k < 0:
        reject(op, "k", "at least 0", k)
    expect_size(op, index, values, grad.shape[-1], k)
    if x is not None:
        expect_dense(op, grad.device, x=x)
        expect_shape(op, "x", x, (*grad.shape[:-1], k), "to match grad")
        expect_dtype(op, "x", x, (grad.dtype,), "to match grad")
    elif need[1]:
        because = "to compute dvalues"
        reject(op, "x", "type Tensor", "None", because=because, error=TypeError)
    return _gradients(grad, x, values, index, k, need)


not_differentiable("block_sparse_linear_backward")


@differentiable("block_sparse_linear")
class BlockSparseLinearFunction(torch.autograd.Function):
    """Derivative of :func:`block_sparse_linear`; ``apply`` takes its arguments.

    Saves x only where the gradient of the values will be asked for; the rest is the layer's own.
    """

    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        return block_sparse_linear.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, values, _, index, _ = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, index)
        ctx.k = x.shape[-1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need = list(ctx.needs_input_grad[:_NEEDS])
        x, values, index = ctx.saved_tensors
        gradients = block_sparse_linear_backward.run_backward(
            ctx, grad, x, values, index, ctx.k, need
        )
        wanted = [g if n else None for g, n in zip(gradients, need, strict=True)]
        return (*wanted, None, None)
