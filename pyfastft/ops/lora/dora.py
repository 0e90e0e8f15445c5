"""What weight-decomposed adaptation (DoRA) adds: the norm of W's rows, and a scale per column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import FLOATS, expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, differentiable, not_differentiable
from pyfastft.ops.lora._operands import expect_layer, expect_lead, wide


@define(
    "(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor? squared) -> Tensor norm"
)
def dora_norm(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    squared: torch.Tensor | None,
) -> torch.Tensor:
    """norm_n = |W_n + s B_n A|, of rows, without W + s B A: see ``lora.md``.

    W (N, K), A (R, K), B (N, R) as of lora_linear; ``squared`` (N,) is |W_n|^2 where it is known
    from before. Output (N,), float32 (float64 beside float64), accumulated in it.
    """
    op = "dora_norm"
    expect_lead(op, "weight", weight)
    n, _, _ = expect_layer(op, "weight", weight, weight, lora_a, lora_b, scaling)
    if squared is not None:
        _expect_column_vector(op, "squared", squared, n, weight)
    return _alloc.empty((n,), like=weight, dtype=wide(weight.dtype))


@define("(Tensor x, Tensor scale, Tensor? bias) -> Tensor y", autocast=("x", "bias"))
def scale_columns(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y = x * g + b, g and b along the last dimension; rounded once.

    x (..., N), any strides; g (N,) is float32 (float64 beside float64), b (N,) of x's dtype.
    """
    op = "scale_columns"
    expect_lead(op, "x", x)
    n = x.shape[-1]
    _expect_column_vector(op, "scale", scale, n, x)
    if bias is not None:
        expect_dense(op, x.device, bias=bias)
        expect_shape(op, "bias", bias, (n,), "to match the columns of x")
        expect_dtype(op, "bias", bias, (x.dtype,), "to match x")
    return _alloc.empty(x.shape, like=x)


@define(
    "(Tensor grad, Tensor? x, Tensor scale, bool[3] need) -> "
    "(Tensor dx, Tensor dscale, Tensor dbias)"
)
def scale_columns_backward(
    grad: torch.Tensor, x: torch.Tensor | None, scale: torch.Tensor, need: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    """dx = grad * g, dg = sum_m grad * x, db = sum_m grad; what is not needed has no elements.

    x is read for dg and may be absent where that is not needed.
    """
    op = "scale_columns_backward"
    expect_lead(op, "grad", grad)
    n = grad.shape[-1]
    _expect_column_vector(op, "scale", scale, n, grad)
    if len(need) != 3:
        reject(op, "need", "three flags (x, scale, bias)", len(need))
    if x is None and need[1]:
        reject(op, "x", "type Tensor", "None", because="to compute dscale", error=TypeError)
    if x is not None:
        expect_dense(op, grad.device, x=x)
        expect_shape(op, "x", x, grad.shape, "to match grad")
        expect_dtype(op, "x", x, (grad.dtype,), "to match grad")
    return (
        _alloc.empty(grad.shape if need[0] else (0,), like=grad),
        _alloc.empty((n,) if need[1] else (0,), like=scale),
        _alloc.empty((n,) if need[2] else (0,), like=grad),
    )


def _expect_column_vector(
    op: str, name: str, vector: torch.Tensor, n: int, beside: torch.Tensor
) -> None:
    expect_dense(op, beside.device, **{name: vector})
    expect_shape(op, name, vector, (n,), "to match the first argument")
    if beside.dtype in FLOATS:
        expect_dtype(op, name, vector, (wide(beside.dtype),), "beside the first argument")


not_differentiable("dora_norm")
not_differentiable("scale_columns_backward")


@differentiable("scale_columns")
class ScaleColumnsFunction(torch.autograd.Function):
    """Derivative of :func:`scale_columns`. Saves x only where dg will be asked for."""

    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        return scale_columns.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, scale, _ = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:3])
        gradients = scale_columns_backward(grad, x, scale, need)
        return tuple(g if n else None for g, n in zip(gradients, need, strict=True))
