"""int4_lora_linear on the native libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft._random import dropout_threshold
from pyfastft.native.lora._layers import optional, rows
from pyfastft.native.ptq4._weights import codebook_code, cpu_unsupported, refuse_perm, zero_kind


def _forward_unsupported(*args: Any) -> str | None:
    return cpu_unsupported(args[0], args[2], args[11])


def _backward_unsupported(*args: Any) -> str | None:
    return cpu_unsupported(args[0], args[3], args[12])


@implement("int4_lora_linear", "cpu", unsupported=_forward_unsupported)
def int4_lora_linear(
    y: torch.Tensor,
    xa: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
) -> None:
    (n, r), k = lora_b.shape, lora_a.shape[1]
    m = x.shape[:-1].numel()
    x = rows(x, m, k)
    codes, scale = codes.contiguous(), scale.contiguous()
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    zero, bias, rng, perm = optional(zero), optional(bias), optional(rng), optional(perm)
    x_stride_m, x_stride_k = x.stride()
    try:
        _native.cpu().int4_lora_linear(
            y=y.data_ptr(),
            xa=xa.data_ptr(),
            x=x.data_ptr(),
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
            zero=address(zero),
            lora_a=lora_a.data_ptr(),
            lora_b=lora_b.data_ptr(),
            bias=address(bias),
            scaling=scaling.data_ptr(),
            rng=address(rng),
            perm=address(perm),
            m=m,
            n=n,
            k=k,
            r=r,
            group_size=group_size,
            x_stride_m=x_stride_m,
            x_stride_k=x_stride_k,
            threshold=dropout_threshold(p) if p else 0,
            codebook=codebook_code(codebook),
            zero_kind=zero_kind(zero),
            scale_dtype=DTYPES[scale.dtype],
            dtype=DTYPES[x.dtype],
            adapter_dtype=DTYPES[lora_a.dtype],
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_perm("int4_lora_linear", error, perm)


@implement("int4_lora_linear_backward", "cpu", unsupported=_backward_unsupported)
def int4_lora_linear_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dzero: torch.Tensor,
    dlora_a: torch.Tensor,
    dlora_b: torch.Tensor,
    dbias: torch.Tensor,
    dscaling: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
    need: Sequence[bool],
) -> None:
    (n, r), k = lora_b.shape, lora_a.shape[1]
    m = grad.shape[:-1].numel()
    grad = rows(grad, m, n)
    if x is not None:
        x = rows(x, m, k)
    codes, scale = codes.contiguous(), scale.contiguous()
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    zero, xa, rng, perm = optional(zero), optional(xa), optional(rng), optional(perm)
    grad_stride_m, grad_stride_n = grad.stride()
    x_stride_m, x_stride_k = (0, 0) if x is None else x.stride()
    try:
        _native.cpu().int4_lora_linear_backward(
            dx=dx.data_ptr(),
            dscale=dscale.data_ptr(),
            dzero=dzero.data_ptr(),
            dlora_a=dlora_a.data_ptr(),
            dlora_b=dlora_b.data_ptr(),
            dbias=dbias.data_ptr(),
            dscaling=dscaling.data_ptr(),
            grad=grad.data_ptr(),
            x=address(x),
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
            zero=address(zero),
            lora_a=lora_a.data_ptr(),
            lora_b=lora_b.data_ptr(),
            xa=address(xa),
            scaling=scaling.data_ptr(),
            rng=address(rng),
            perm=address(perm),
            m=m,
            n=n,
            k=k,
            r=r,
            group_size=group_size,
            grad_stride_m=grad_stride_m,
            grad_stride_n=grad_stride_n,
            x_stride_m=x_stride_m,
            x_stride_k=x_stride_k,
            threshold=dropout_threshold(p) if p else 0,
            codebook=codebook_code(codebook),
            zero_kind=zero_kind(zero),
            scale_dtype=DTYPES[scale.dtype],
            dtype=DTYPES[grad.dtype],
            adapter_dtype=DTYPES[lora_a.dtype],
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_perm("int4_lora_linear_backward", error, perm)
