"""int4_linear on the native libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.lora._layers import optional, rows
from pyfastft.native.ptq4._weights import codebook_code, cpu_unsupported, refuse_perm, zero_kind


def _forward_unsupported(
    x: torch.Tensor, codes: Any, scale: torch.Tensor, *rest: Any
) -> str | None:
    return cpu_unsupported(x, scale, rest[3])


def _backward_unsupported(
    grad: torch.Tensor, x: Any, codes: Any, scale: torch.Tensor, *rest: Any
) -> str | None:
    return cpu_unsupported(grad, scale, rest[2])


@implement("int4_linear", "cpu", unsupported=_forward_unsupported)
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
    n, k = codes.shape[0], x.shape[-1]
    m = x.shape[:-1].numel()
    x = rows(x, m, k)
    codes, scale = codes.contiguous(), scale.contiguous()
    zero, bias, perm = optional(zero), optional(bias), optional(perm)
    x_stride_m, x_stride_k = x.stride()
    try:
        _native.cpu().int4_linear(
            y=y.data_ptr(),
            x=x.data_ptr(),
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
            zero=address(zero),
            bias=address(bias),
            perm=address(perm),
            m=m,
            n=n,
            k=k,
            group_size=group_size,
            x_stride_m=x_stride_m,
            x_stride_k=x_stride_k,
            codebook=codebook_code(codebook),
            zero_kind=zero_kind(zero),
            scale_dtype=DTYPES[scale.dtype],
            dtype=DTYPES[x.dtype],
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_perm("int4_linear", error, perm)


@implement("int4_linear_backward", "cpu", unsupported=_backward_unsupported)
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
    n = codes.shape[0]
    m = grad.shape[:-1].numel()
    grad = rows(grad, m, n)
    if x is not None:
        x = rows(x, m, k)
    codes, scale = codes.contiguous(), scale.contiguous()
    zero, perm = optional(zero), optional(perm)
    grad_stride_m, grad_stride_n = grad.stride()
    x_stride_m, x_stride_k = (0, 0) if x is None else x.stride()
    # An output that is not needed has no elements: its address is null, and it is not computed.
    try:
        _native.cpu().int4_linear_backward(
            dx=dx.data_ptr(),
            dscale=dscale.data_ptr(),
            dzero=dzero.data_ptr(),
            dbias=dbias.data_ptr(),
            grad=grad.data_ptr(),
            x=address(x),
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
            zero=address(zero),
            perm=address(perm),
            m=m,
            n=n,
            k=k,
            group_size=group_size,
            grad_stride_m=grad_stride_m,
            grad_stride_n=grad_stride_n,
            x_stride_m=x_stride_m,
            x_stride_k=x_stride_k,
            codebook=codebook_code(codebook),
            zero_kind=zero_kind(zero),
            scale_dtype=DTYPES[scale.dtype],
            dtype=DTYPES[grad.dtype],
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_perm("int4_linear_backward", error, perm)
