"""masked_weight_grad on the CPU library."""

from __future__ import annotations

import torch

from pyfastft import _native
from pyfastft._native import DTYPES
from pyfastft._op import implement
from pyfastft.native.masked._rectangles import cpu_unsupported, refuse_index, sizes


def _unsupported(grad: torch.Tensor, *_: object) -> str | None:
    return cpu_unsupported(grad)


@implement("masked_weight_grad", "cpu", unsupported=_unsupported)
def masked_weight_grad(
    values: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    rows: int,
    columns: int,
) -> None:
    n, k = grad.shape[-1], x.shape[-1]
    m = 1
    for size in grad.shape[:-1]:
        m *= size
    grad, x, index = grad.reshape(m, n), x.reshape(m, k), index.contiguous()
    (grad_stride_m, grad_stride_n), (x_stride_m, x_stride_k) = grad.stride(), x.stride()
    try:
        _native.cpu().masked_weight_grad(
            values=values.data_ptr(),
            grad=grad.data_ptr(),
            x=x.data_ptr(),
            index=index.data_ptr(),
            m=m,
            n=n,
            k=k,
            grad_stride_m=grad_stride_m,
            grad_stride_n=grad_stride_n,
            x_stride_m=x_stride_m,
            x_stride_k=x_stride_k,
            dtype=DTYPES[grad.dtype],
            threads=torch.get_num_threads(),
            **sizes(index, rows, columns),
        )
    except RuntimeError as error:
        refuse_index("masked_weight_grad", error)
