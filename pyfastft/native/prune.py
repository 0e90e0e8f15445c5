"""The prune family on the CPU library."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.lora._layers import cpu_unsupported, optional, rows
from pyfastft.ops.prune._pattern import expect_index, grid_of


@implement("block_sparse_linear", "cpu", unsupported=cpu_unsupported)
def block_sparse_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor,
    n: int,
) -> None:
    m, k = x.shape[:-1].numel(), x.shape[-1]
    blocks, block_rows, block_columns = values.shape
    index = index.contiguous()
    expect_index("block_sparse_linear", index, grid_of(n, k, block_rows, block_columns))
    x, values, bias = rows(x, m, k), values.contiguous(), optional(bias)
    x_stride_m, x_stride_k = x.stride()
    _native.cpu().block_sparse_linear(
        y=y.data_ptr(),
        x=x.data_ptr(),
        values=values.data_ptr(),
        bias=address(bias),
        index=index.data_ptr(),
        m=m,
        n=n,
        k=k,
        blocks=blocks,
        rows=block_rows,
        columns=block_columns,
        x_stride_m=x_stride_m,
        x_stride_k=x_stride_k,
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )


@implement("block_sparse_linear_backward", "cpu", unsupported=cpu_unsupported)
def block_sparse_linear_backward(
    dx: torch.Tensor,
    dvalues: torch.Tensor,
    dbias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    values: torch.Tensor,
    index: torch.Tensor,
    k: int,
    need: Sequence[bool],
) -> None:
    m, n = grad.shape[:-1].numel(), grad.shape[-1]
    blocks, block_rows, block_columns = values.shape
    index = index.contiguous()
    expect_index("block_sparse_linear_backward", index, grid_of(n, k, block_rows, block_columns))
    grad, values = rows(grad, m, n), values.contiguous()
    if x is not None:
        x = rows(x, m, k)
    grad_stride_m, grad_stride_n = grad.stride()
    x_stride_m, x_stride_k = (0, 0) if x is None else x.stride()
    # An output that is not needed has no elements: its address is null, and it is not computed.
    _native.cpu().block_sparse_linear_backward(
        dx=dx.data_ptr(),
        dvalues=dvalues.data_ptr(),
        dbias=dbias.data_ptr(),
        grad=grad.data_ptr(),
        x=address(x),
        values=values.data_ptr(),
        index=index.data_ptr(),
        m=m,
        n=n,
        k=k,
        blocks=blocks,
        rows=block_rows,
        columns=block_columns,
        grad_stride_m=grad_stride_m,
        grad_stride_n=grad_stride_n,
        x_stride_m=x_stride_m,
        x_stride_k=x_stride_k,
        dtype=DTYPES[grad.dtype],
        threads=torch.get_num_threads(),
    )
