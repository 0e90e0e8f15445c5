"""int8_linear and its gradients on the CPU library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.lora._layers import cpu_unsupported, optional, rows


def _weight(codes: torch.Tensor, scale: torch.Tensor, like: torch.Tensor) -> dict[str, Any]:
    return {
        "codes": codes.data_ptr(),
        "scale": scale.data_ptr(),
        "codes_stride_n": codes.stride(0),
        "codes_stride_k": codes.stride(1),
        "n": codes.shape[0],
        "k": codes.shape[1],
        "dtype": DTYPES[like.dtype],
        "threads": torch.get_num_threads(),
    }


@implement("int8_linear", "cpu", unsupported=cpu_unsupported)
def int8_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    m = x.shape[:-1].numel()
    x, scale, bias = rows(x, m, codes.shape[1]), scale.contiguous(), optional(bias)
    _native.cpu().int8_linear(
        y=y.data_ptr(),
        x=x.data_ptr(),
        bias=address(bias),
        m=m,
        x_stride_m=x.stride(0),
        x_stride_k=x.stride(1),
        **_weight(codes, scale, x),
    )


@implement("int8_linear_backward", "cpu", unsupported=cpu_unsupported)
def int8_linear_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dbias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    need: Sequence[bool],
) -> None:
    m, (n, k) = grad.shape[:-1].numel(), codes.shape
    grad, scale = rows(grad, m, n), scale.contiguous()
    x = None if x is None else rows(x, m, k)
    x_stride_m, x_stride_k = (0, 0) if x is None else x.stride()
    _native.cpu().int8_linear_backward(
        dx=address(dx),
        dscale=address(dscale),
        dbias=address(dbias),
        grad=grad.data_ptr(),
        x=address(x),
        m=m,
        grad_stride_m=grad.stride(0),
        grad_stride_n=grad.stride(1),
        x_stride_m=x_stride_m,
        x_stride_k=x_stride_k,
        **_weight(codes, scale, grad),
    )
