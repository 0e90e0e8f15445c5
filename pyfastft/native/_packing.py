"""Weights packed once, for the CPU's GEMM core.

The packed form holds a weight's values in the order in which the core reads them, so that a product
need not bring them into it: for :math:`x W^T` the weight itself, for :math:`g W` its transpose. It
may stand in the place of the weight, which comes back bit for bit. It is neither portable nor to be
stored: another level of the instruction set packs otherwise.
"""

from __future__ import annotations

import torch

from pyfastft import _alloc, _native
from pyfastft._check import expect_dense, expect_dtype, name_of, reject
from pyfastft._native import DTYPES


def _needs_library(op: str) -> None:
    why = _native.why_no_cpu()
    if why is not None:
        raise NotImplementedError(f"{op}: {why}")


def packed_bytes(n: int, k: int, dtype: torch.dtype) -> int:
    """The bytes of a packed weight (n, k): the weight's own, lines filled up to a multiple of 16 at
    most, an odd k of bfloat16 to an even one, and 64 for a header."""
    return _native.cpu().pack_weight_bytes(n, k, DTYPES[dtype])


def pack(weight: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """A weight (N, K) as the GEMM core reads it.

    Args:
        weight: (N, K), of any strides; float32, bfloat16 or float16.
        transposed: pack the transpose, for products over N.

    Returns:
        uint8, of one dimension.

    Raises:
        TypeError, ValueError: the weight is of another dtype, layout, shape or device.
        NotImplementedError: there is no CPU extension.
    """
    expect_dense("pack", torch.device("cpu"), weight=weight)
    expect_dtype("pack", "weight", weight, DTYPES)
    if weight.dim() != 2:
        reject("pack", "weight", "shape (N, K)", tuple(weight.shape))
    _needs_library("pack")
    if transposed:
        weight = weight.T
    n, k = weight.shape
    stride_n, stride_k = weight.stride()
    size = packed_bytes(n, k, weight.dtype)
    packed = torch.empty(size, dtype=torch.uint8)
    _native.cpu().pack_weight(
        packed=packed.data_ptr(),
        weight=weight.data_ptr(),
        packed_bytes=size,
        n=n,
        k=k,
        stride_n=stride_n,
        stride_k=stride_k,
        dtype=DTYPES[weight.dtype],
        threads=torch.get_num_threads(),
    )
    return packed


def expect_packed(op: str, **operands: object) -> None:
    """TypeError or ValueError unless all are what :func:`pack` returns, as far as shape and dtype
    tell; the library holds the header against the weight that it expects."""
    expect_dense(op, torch.device("cpu"), **operands)
    for arg, packed in operands.items():
        assert isinstance(packed, torch.Tensor)
        expect_dtype(op, arg, packed, (torch.uint8,), "of a packed weight")
        if packed.dim() != 1 or not packed.is_contiguous():
            reject(op, arg, "shape (bytes,), contiguous", (tuple(packed.shape), packed.stride()))


def unpack(packed: torch.Tensor, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight (n, k) that :func:`pack` was given, bit for bit.

    Raises:
        TypeError, ValueError: an argument is not of its kind.
        RuntimeError: it holds another weight than (n, k) of this dtype, is cut short, or was packed
            at another level of the instruction set.
    """
    expect_packed("unpack", packed=packed)
    if dtype not in DTYPES:
        names = " or ".join(map(name_of, DTYPES))
        reject("unpack", "dtype", names, name_of(dtype), error=TypeError)
    if min(n, k) < 0:
        reject("unpack", "n and k", "sizes", (n, k))
    _needs_library("unpack")
    weight = _alloc.empty((n, k), like=packed, dtype=dtype)
    _native.cpu().unpack_weight(
        weight=weight.data_ptr(),
        packed=packed.data_ptr(),
        packed_bytes=packed.numel(),
        n=n,
        k=k,
        dtype=DTYPES[dtype],
        threads=torch.get_num_threads(),
    )
    return weight
