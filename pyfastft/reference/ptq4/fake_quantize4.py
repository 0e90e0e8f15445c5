"""fake_quantize4 and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.reference.lora.linear import rows
from pyfastft.reference.ptq4.dequantize import in_order_of_codes, in_order_of_features

HIGHEST = 15


def range_of_places(
    x_scale: torch.Tensor, x_zero: torch.Tensor, k: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and integer zero of every place of K; a NaN as scale where there is no such range."""
    fine = (x_scale > 0) & x_zero.isfinite()
    scale = torch.where(fine, x_scale, torch.nan)
    zero = torch.where(fine, x_zero, 0.0).clamp(0, HIGHEST).round()
    if len(x_scale) == 1:
        return scale.expand(k), zero.expand(k)
    group = torch.arange(k, device=x_scale.device) // group_size
    return scale[group], zero[group]


def quantized(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x / scale, and the code of it minus zero, an integer."""
    steps = x / scale
    limited = torch.minimum(torch.maximum(steps, -zero), HIGHEST - zero)
    return steps, limited.round()


@implement("fake_quantize4", "reference")
def fake_quantize4(
    y: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    perm: torch.Tensor | None,
    group_size: int,
) -> None:
    places = in_order_of_codes(rows(x).to(x_scale.dtype), perm)
    scale, zero = range_of_places(x_scale, x_zero, places.shape[1], group_size)
    rounded = scale * quantized(places, scale, zero)[1]
    y.copy_(in_order_of_features(rounded, perm).view_as(y))


@implement("fake_quantize4_backward", "reference")
def fake_quantize4_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dzero: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    perm: torch.Tensor | None,
    group_size: int,
    need: Sequence[bool],
) -> None:
    places = in_order_of_codes(rows(x).to(x_scale.dtype), perm)
    dy = in_order_of_codes(rows(grad).to(x_scale.dtype), perm)
    scale, zero = range_of_places(x_scale, x_zero, places.shape[1], group_size)
    steps, codes = quantized(places, scale, zero)
    inside = (steps >= -zero) & (steps <= HIGHEST - zero)
    if need[0]:
        gradient = torch.where(inside, dy, 0.0).where(~steps.isnan(), steps)
        dx.copy_(in_order_of_features(gradient, perm).view_as(dx))
    if need[1]:
        dscale.copy_(
            _range_sums(dy * torch.where(inside, codes - steps, codes), x_scale, group_size)
        )
    if need[2]:
        found = _range_sums(torch.where(inside, 0.0, -scale * dy), x_scale, group_size)
        dzero.copy_(torch.where((x_zero >= 0) & (x_zero <= HIGHEST), found, 0.0))


def _range_sums(matrix: torch.Tensor, like: torch.Tensor, group_size: int) -> torch.Tensor:
    """The sums of the columns that share a range."""
    columns = matrix.sum(0)
    if len(like) == 1:
        return columns.sum(0, keepdim=True)
    group = torch.arange(len(columns), device=like.device) // group_size
    return torch.zeros_like(like).index_add_(0, group, columns)
