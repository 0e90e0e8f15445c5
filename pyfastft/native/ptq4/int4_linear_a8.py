"""int4_linear_a8 on the CPU library."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.lora._layers import optional, rows
from pyfastft.native.ptq4._weights import cpu_unsupported, refuse_perm, zero_kind


def _unsupported(x: torch.Tensor, codes: Any, scale: torch.Tensor, *_: Any) -> str | None:
    return cpu_unsupported(x, scale)


@implement("int4_linear_a8", "cpu", unsupported=_unsupported)
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
    m, k = x.shape[:-1].numel(), x.shape[-1]
    x, codes, scale = rows(x, m, k), codes.contiguous(), scale.contiguous()
    zero, bias, perm = optional(zero), optional(bias), optional(perm)
    try:
        _native.cpu().int4_linear_a8(
            y=y.data_ptr(),
            x=x.data_ptr(),
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
            zero=address(zero),
            perm=address(perm),
            bias=address(bias),
            m=m,
            n=codes.shape[0],
            k=k,
            group_size=group_size,
            x_stride_m=x.stride(0),
            x_stride_k=x.stride(1),
            zero_kind=zero_kind(zero),
            scale_dtype=DTYPES[scale.dtype],
            dtype=DTYPES[x.dtype],
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_perm("int4_linear_a8", error, perm)
