"""abs_row_sums on the CPU library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.lora._layers import cpu_unsupported


def _sizes(u: torch.Tensor, v: torch.Tensor, w: torch.Tensor | None) -> dict[str, int]:
    w_stride_n, w_stride_k = (0, 0) if w is None else w.stride()
    return {
        "n": u.shape[0],
        "k": v.shape[0],
        "r": u.shape[1],
        "u_stride_n": u.stride(0),
        "u_stride_r": u.stride(1),
        "v_stride_k": v.stride(0),
        "v_stride_r": v.stride(1),
        "w_stride_n": w_stride_n,
        "w_stride_k": w_stride_k,
        "dtype": DTYPES[u.dtype],
        "threads": torch.get_num_threads(),
    }


@implement("abs_row_sums", "cpu", unsupported=cpu_unsupported)
def abs_row_sums(
    sums: torch.Tensor, u: torch.Tensor, v: torch.Tensor, w: torch.Tensor | None
) -> None:
    _native.cpu().abs_row_sums(
        sums=sums.data_ptr(), u=u.data_ptr(), v=v.data_ptr(), w=address(w), **_sizes(u, v, w)
    )


def _backward_unsupported(grad: torch.Tensor, u: torch.Tensor, *_: Any) -> str | None:
    return cpu_unsupported(u)


@implement("abs_row_sums_backward", "cpu", unsupported=_backward_unsupported)
def abs_row_sums_backward(
    du: torch.Tensor,
    dv: torch.Tensor,
    dw: torch.Tensor,
    grad: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor | None,
    need: Sequence[bool],
) -> None:
    grad = grad.contiguous()
    _native.cpu().abs_row_sums_backward(
        du=du.data_ptr(),
        dv=dv.data_ptr(),
        dw=dw.data_ptr(),
        grad=grad.data_ptr(),
        u=u.data_ptr(),
        v=v.data_ptr(),
        w=address(w),
        **_sizes(u, v, w),
    )
