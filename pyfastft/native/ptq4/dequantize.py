"""int4_dequantize on the native libraries."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft import _native
from pyfastft._check import name_of
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.lora._layers import optional
from pyfastft.native.ptq4._weights import codebook_code, cpu_unsupported, refuse_perm, zero_kind


def _unsupported(codes: torch.Tensor, scale: torch.Tensor, *rest: Any) -> str | None:
    dtype = rest[-1]
    if dtype not in DTYPES:
        return f"{name_of(dtype)} is not one of {', '.join(map(name_of, DTYPES))}"
    return cpu_unsupported(scale, scale)


@implement("int4_dequantize", "cpu", unsupported=_unsupported)
def int4_dequantize(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
    dtype: torch.dtype,
) -> None:
    codes, scale = codes.contiguous(), scale.contiguous()
    zero, perm = optional(zero), optional(perm)
    try:
        _native.cpu().int4_dequantize(
            weight=weight.data_ptr(),
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
            zero=address(zero),
            perm=address(perm),
            n=codes.shape[0],
            k=k,
            group_size=group_size,
            codebook=codebook_code(codebook),
            zero_kind=zero_kind(zero),
            scale_dtype=DTYPES[scale.dtype],
            dtype=DTYPES[dtype],
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_perm("int4_dequantize", error, perm)
