"""fake_quantize4 and its gradients on the CPU library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.lora._layers import cpu_unsupported, optional, rows
from pyfastft.native.ptq4._weights import refuse_perm


def _call(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    perm: torch.Tensor | None,
    group_size: int,
) -> dict[str, Any]:
    """x is a matrix; the others are contiguous."""
    return {
        "x": x.data_ptr(),
        "x_scale": x_scale.data_ptr(),
        "x_zero": x_zero.data_ptr(),
        "perm": address(perm),
        "m": x.shape[0],
        "k": x.shape[1],
        "group_size": group_size,
        "x_groups": len(x_scale),
        "x_stride_m": x.stride(0),
        "x_stride_k": x.stride(1),
        "dtype": DTYPES[x.dtype],
        "threads": torch.get_num_threads(),
    }


@implement("fake_quantize4", "cpu", unsupported=cpu_unsupported)
def fake_quantize4(
    y: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    perm: torch.Tensor | None,
    group_size: int,
) -> None:
    x = rows(x, x.shape[:-1].numel(), x.shape[-1])
    x_scale, x_zero, perm = x_scale.contiguous(), x_zero.contiguous(), optional(perm)
    try:
        _native.cpu().fake_quantize4(y=y.data_ptr(), **_call(x, x_scale, x_zero, perm, group_size))
    except RuntimeError as error:
        refuse_perm("fake_quantize4", error, perm)


@implement("fake_quantize4_backward", "cpu", unsupported=cpu_unsupported)
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
    m, k = x.shape[:-1].numel(), x.shape[-1]
    x, grad = rows(x, m, k), rows(grad, m, k)
    x_scale, x_zero, perm = x_scale.contiguous(), x_zero.contiguous(), optional(perm)
    try:
        _native.cpu().fake_quantize4_backward(
            dx=address(dx),
            dscale=address(dscale),
            dzero=address(dzero),
            grad=grad.data_ptr(),
            grad_stride_m=grad.stride(0),
            grad_stride_k=grad.stride(1),
            **_call(x, x_scale, x_zero, perm, group_size),
        )
    except RuntimeError as error:
        refuse_perm("fake_quantize4_backward", error, perm)
