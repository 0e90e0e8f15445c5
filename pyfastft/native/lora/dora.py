"""DoRA's row norms and column scales on the CPU library."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.lora._layers import cpu_unsupported, optional, rows


@implement("dora_norm", "cpu", unsupported=cpu_unsupported)
def dora_norm(
    norm: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    squared: torch.Tensor | None,
) -> None:
    # W is read once either way, and W + s B A loses nothing to cancellation: ``squared`` would
    # save no pass.
    n, k = weight.shape
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    _native.cpu().dora_norm(
        norm=norm.data_ptr(),
        weight=weight.data_ptr(),
        lora_a=lora_a.data_ptr(),
        lora_b=lora_b.data_ptr(),
        scaling=scaling.data_ptr(),
        n=n,
        k=k,
        r=lora_a.shape[0],
        weight_stride_n=weight.stride(0),
        weight_stride_k=weight.stride(1),
        dtype=DTYPES[weight.dtype],
        adapter_dtype=DTYPES[lora_a.dtype],
        threads=torch.get_num_threads(),
    )


@implement("scale_columns", "cpu", unsupported=cpu_unsupported)
def scale_columns(
    y: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    m, n = x.shape[:-1].numel(), x.shape[-1]
    x, scale, bias = rows(x, m, n), scale.contiguous(), optional(bias)
    _native.cpu().scale_columns(
        y=y.data_ptr(),
        x=x.data_ptr(),
        scale=scale.data_ptr(),
        bias=address(bias),
        m=m,
        n=n,
        x_stride_m=x.stride(0),
        x_stride_n=x.stride(1),
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )


@implement("scale_columns_backward", "cpu", unsupported=cpu_unsupported)
def scale_columns_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dbias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    scale: torch.Tensor,
    need: Sequence[bool],
) -> None:
    m, n = grad.shape[:-1].numel(), grad.shape[-1]
    grad, scale = rows(grad, m, n), scale.contiguous()
    x = None if x is None else rows(x, m, n)
    x_stride_m, x_stride_n = (0, 0) if x is None else x.stride()
    _native.cpu().scale_columns_backward(
        dx=dx.data_ptr(),
        dscale=dscale.data_ptr(),
        dbias=dbias.data_ptr(),
        grad=grad.data_ptr(),
        x=address(x),
        scale=scale.data_ptr(),
        m=m,
        n=n,
        grad_stride_m=grad.stride(0),
        grad_stride_n=grad.stride(1),
        x_stride_m=x_stride_m,
        x_stride_n=x_stride_n,
        dtype=DTYPES[grad.dtype],
        threads=torch.get_num_threads(),
    )
