"""The CPU's GEMM core by itself: what the products of the ops run on."""

from __future__ import annotations

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address


def matmul(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    packed_b: torch.Tensor | None = None,
    packed_transposed: bool = False,
) -> None:
    """:math:`out = a b^T`, accumulated in float32: M × N, M × K, N × K.

    Args:
        out: (M, N), contiguous.
        a: (M, K), of any strides and ``out``'s dtype.
        b: (N, K), of any strides and ``out``'s dtype.
        packed_b: in its place, ``pack(b)`` of :mod:`pyfastft.native._packing`.
        packed_transposed: ``packed_b`` is ``pack(b.T)``.
    """
    (m, k), n = a.shape, out.shape[1]
    a_stride_m, a_stride_k = a.stride()
    b_stride_n, b_stride_k = (0, 0) if b is None else b.stride()
    _native.cpu().matmul(
        c=out.data_ptr(),
        a=a.data_ptr(),
        b=address(b),
        packed_b=address(packed_b),
        packed_b_bytes=0 if packed_b is None else packed_b.numel(),
        m=m,
        n=n,
        k=k,
        a_stride_m=a_stride_m,
        a_stride_k=a_stride_k,
        b_stride_n=b_stride_n,
        b_stride_k=b_stride_k,
        packed_transposed=packed_transposed,
        dtype=DTYPES[out.dtype],
        threads=torch.get_num_threads(),
    )
