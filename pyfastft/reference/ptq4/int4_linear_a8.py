"""int4_linear_a8."""

from __future__ import annotations

import torch

from pyfastft._op import implement
from pyfastft.ops.lora._operands import wide
from pyfastft.reference.lora.linear import rows
from pyfastft.reference.ptq4.dequantize import in_order_of_codes, steps, unpacked

HIGHEST = 127


def add_group(
    total: torch.Tensor,
    products: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """total + x_scale (M) scale (N) * products (M, N): in this order, each operation rounded."""
    return total + (x_scale[:, None] * scale[None, :].to(x_scale.dtype)) * products


@implement("int4_linear_a8", "reference")
def int4_linear_a8(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    group_size: int,
) -> None:
    k, dtype = x.shape[-1], wide(x.dtype)
    places = in_order_of_codes(rows(x).to(dtype), perm)
    # Products of integers, exact in float64.
    if zero is not None and zero.is_floating_point():
        weight, float_zero = unpacked(codes, k).double(), zero.to(dtype)
    else:
        weight, float_zero = steps(codes, zero, k, group_size, "int4", torch.float64), None
    total = torch.zeros(len(places), len(codes), dtype=dtype, device=x.device)
    for g in range(scale.shape[1]):
        group = slice(g * group_size, (g + 1) * group_size)
        own = places[:, group]
        largest = own.abs().amax(1)
        x_scale = torch.where(largest.isfinite(), largest / HIGHEST, torch.nan)
        divisor = torch.where(x_scale > 0, x_scale, 1.0)[:, None]
        q = (own / divisor).clamp(-HIGHEST, HIGHEST).round().double()
        products = (q @ weight[:, group].T).to(dtype)
        if float_zero is not None:
            products = products - float_zero[None, :, g] * q.sum(1, keepdim=True).to(dtype)
        total = add_group(total, products, x_scale, scale[:, g])
    if bias is not None:
        total = total + bias.to(dtype)
    y.copy_(total.view_as(y))
