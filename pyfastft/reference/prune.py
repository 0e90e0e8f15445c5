"""The prune family's truth: the weight made dense. Symbols as in ``ops/prune.md``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.ops.prune._pattern import blocks_of, dense_of, expect_index, grid_of
from pyfastft.reference.lora.linear import rows


@implement("block_sparse_linear", "reference")
def block_sparse_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor,
    n: int,
) -> None:
    """y = x W^T + b."""
    k = x.shape[-1]
    expect_index("block_sparse_linear", index, grid_of(n, k, *values.shape[1:]))
    weight = dense_of(values, index, n, k)
    y.copy_(torch.nn.functional.linear(rows(x), weight, bias).view_as(y))


@implement("block_sparse_linear_backward", "reference")
def block_sparse_linear_backward(
    dx: torch.Tensor,
    dvalues: torch.Tensor,
    dbias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    values: torch.Tensor,
    index: torch.Tensor,
    k: int,
    need: Sequence[bool],
) -> None:
    """dX = dY W, dvalues = the blocks of dY^T X, db = sum_m dY."""
    n = grad.shape[-1]
    expect_index("block_sparse_linear_backward", index, grid_of(n, k, *values.shape[1:]))
    dy = rows(grad)
    if need[0]:
        dx.copy_((dy @ dense_of(values, index, n, k)).view_as(dx))
    if need[1]:
        assert x is not None
        dvalues.copy_(blocks_of(dy.T @ rows(x), index, *values.shape[1:]))
    if need[2]:
        dbias.copy_(dy.sum(0))
