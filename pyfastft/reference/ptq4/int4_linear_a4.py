"""int4_linear_a4."""

from __future__ import annotations

import torch

from pyfastft._op import implement
from pyfastft.reference.lora.linear import rows
from pyfastft.reference.ptq4.dequantize import in_order_of_codes, steps
from pyfastft.reference.ptq4.fake_quantize4 import quantized, range_of_places
from pyfastft.reference.ptq4.int4_linear_a8 import add_group


@implement("int4_linear_a4", "reference")
def int4_linear_a4(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    group_size: int,
) -> None:
    k, dtype = x.shape[-1], x_scale.dtype
    places = in_order_of_codes(rows(x).to(dtype), perm)
    scale_of_place, zero_of_place = range_of_places(x_scale, x_zero, k, group_size)
    q = quantized(places, scale_of_place, zero_of_place)[1].nan_to_num(0.0).double()
    # Products of integers, exact in float64.
    weight = steps(codes, zero, k, group_size, "int4", torch.float64)
    total = torch.zeros(len(places), len(codes), dtype=dtype, device=x.device)
    for g in range(scale.shape[1]):
        group = slice(g * group_size, (g + 1) * group_size)
        own = torch.where(
            places[:, group].isnan().any(1), torch.nan, scale_of_place[g * group_size]
        )
        total = add_group(total, (q[:, group] @ weight[:, group].T).to(dtype), own, scale[:, g])
    if bias is not None:
        total = total + bias.to(dtype)
    y.copy_(total.view_as(y))
