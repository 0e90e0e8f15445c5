"""int4_linear and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.ops.lora._operands import wide
from pyfastft.reference.lora.linear import rows
from pyfastft.reference.ptq4.dequantize import dequantized, in_order_of_codes, steps


@implement("int4_linear", "reference")
def int4_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
) -> None:
    """y = x W^T + b."""
    k = x.shape[-1]
    weight = dequantized(codes, scale, zero, perm, k, group_size, codebook, x.dtype)
    y.copy_(torch.nn.functional.linear(rows(x), weight, bias).view_as(y))


@implement("int4_linear_backward", "reference")
def int4_linear_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dzero: torch.Tensor,
    dbias: torch.Tensor,
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
) -> None:
    """dX = dY W, db = sum_m dY, and the gradients of scale and zero."""
    dy = rows(grad)
    if need[0]:
        weight = dequantized(codes, scale, zero, perm, k, group_size, codebook, grad.dtype)
        dx.copy_((dy @ weight).view_as(dx))
    if need[1] or need[2]:
        assert x is not None
        wanted = dscale if need[1] else None, dzero if need[2] else None
        grid_gradients(*wanted, dy, rows(x), codes, scale, zero, perm, group_size, codebook)
    if need[3]:
        dbias.copy_(dy.sum(0))


def grid_gradients(
    dscale: torch.Tensor | None,
    dzero: torch.Tensor | None,
    dy: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    group_size: int,
    codebook: str,
) -> None:
    """With D = dY^T X in the order of the codes: dscale[n, g] = sum of D * (c - zero) over the
    group, dzero[n, g] = -scale[n, g] * sum of D."""
    k = x.shape[1]
    exact = torch.promote_types(wide(dy.dtype), wide(scale.dtype))
    dweight = in_order_of_codes(dy.T @ x, perm).to(exact)
    if dscale is not None:
        by = steps(codes, zero, k, group_size, codebook, exact)
        dscale.copy_(_group_sums(dweight * by, scale.shape[1], group_size))
    if dzero is not None:
        dzero.copy_(-scale.to(exact) * _group_sums(dweight, scale.shape[1], group_size))


def _group_sums(matrix: torch.Tensor, groups: int, group_size: int) -> torch.Tensor:
    n, k = matrix.shape
    group = torch.arange(k, device=matrix.device) // group_size
    return matrix.new_zeros(n, groups).index_add_(1, group, matrix)
