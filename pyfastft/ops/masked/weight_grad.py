"""masked_weight_grad: the gradient of a linear layer's weight, at its trained entries only."""

from __future__ import annotations

import torch

from pyfastft import _alloc
from pyfastft._check import FLOATS, expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, not_differentiable
from pyfastft.ops.masked._rectangles import expect_rectangles, wide


@define("(Tensor grad, Tensor x, Tensor index, SymInt rows, SymInt columns) -> Tensor values")
def masked_weight_grad(
    grad: torch.Tensor, x: torch.Tensor, index: torch.Tensor, rows: int = 1, columns: int = 1
) -> torch.Tensor:
    """values = (grad^T x) at the rectangles of an (N, K) matrix, which is never formed.

    grad (..., N), x (..., K) of one dtype, any strides; index (count,), int32 or int64.
    Output (count * rows * columns,), float32 (float64 beside float64), accumulated in it.
    """
    op = "masked_weight_grad"
    expect_dense(op, None, grad=grad)
    expect_dense(op, grad.device, x=x, index=index)
    expect_dtype(op, "grad", grad, FLOATS)
    expect_dtype(op, "x", x, (grad.dtype,), "to match grad")
    if grad.dim() < 1:
        reject(op, "grad", "shape (..., N)", tuple(grad.shape))
    if x.dim() < 1:
        reject(op, "x", "shape (..., K)", tuple(x.shape))
    expect_shape(op, "x", x, (*grad.shape[:-1], "K"), "to match grad's leading dimensions")
    count = expect_rectangles(op, "index", index, rows, columns, grad.shape[-1], x.shape[-1])
    return _alloc.empty((count,), like=grad, dtype=wide(grad.dtype))


not_differentiable("masked_weight_grad")
