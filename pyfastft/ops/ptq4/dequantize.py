"""int4_dequantize: a 4-bit weight as the matrix that it stands for."""

from __future__ import annotations

import torch

from pyfastft import _alloc
from pyfastft._check import FLOATS, name_of, reject
from pyfastft._op import define
from pyfastft.ops.ptq4._operands import expect_int4


@define(
    "(Tensor codes, Tensor scale, Tensor? zero, Tensor? perm, SymInt k, SymInt group_size, "
    "str codebook, ScalarType dtype) -> Tensor weight"
)
def int4_dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W[n, perm[j]] = scale[n, j // g] * (c[n, j] - zero[n, j // g]), of nf4 and fp4
    scale[n, j // g] * table[c[n, j]]; W (N, K).

    Computed in float32 (float64 where the dtype or the scale is), difference and product each
    rounded, and rounded once to ``dtype``: every backend gives the same bits. Operands as in
    ``ptq4.md``. It has no gradient.
    """
    op = "int4_dequantize"
    n, _ = expect_int4(op, None, codes, scale, zero, perm, k, group_size, codebook)
    if dtype not in FLOATS:
        names = " or ".join(map(name_of, FLOATS))
        reject(op, "dtype", names, name_of(dtype), error=TypeError)
    return _alloc.empty((n, k), like=codes, dtype=dtype)
