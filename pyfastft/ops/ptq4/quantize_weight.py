"""rtn_quantize and hqq_quantize: a weight in 4-bit codes with a scale per group."""

from __future__ import annotations

import torch

from pyfastft import _alloc
from pyfastft._check import FLOATS, expect_dense, expect_dtype, expect_shape, name_of, reject
from pyfastft._codebook import CODEBOOKS
from pyfastft._op import define, not_differentiable

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@define(
    "(Tensor weight, int group_size, str codebook, bool symmetric, int grid, "
    "ScalarType scale_dtype) -> (Tensor codes, Tensor scale, Tensor zero)"
)
def rtn_quantize(
    weight: torch.Tensor,
    group_size: int,
    codebook: str,
    symmetric: bool,
    grid: int,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """Round-to-nearest of weight (N, K), the best of ``grid`` clipped ranges by squared error.

    Per group of ``group_size`` along K and per candidate p_i = 1 - i / (2 grid), i < grid, with s
    rounded to ``scale_dtype`` before it is used and ties to even:

    - int4: low = min(w, 0), high = max(w, 0), s = (high - low) / 15 p, z = rint(-low p / s),
      c = clamp(rint(w / s) + z, 0, 15);
    - int4, symmetric: s = max|w| / 7.5 p, z = 8;
    - nf4, fp4: s = max|w| p, c the code of the value nearest to w / s, the lower one of two.

    The first candidate of the least sum of (w - s (c - z))^2 over the group wins. A group of zeros
    has s = 1, z = 8 and c = 8. One with a weight that is not finite, or a range beyond float32, has
    the codes of zeros and a NaN as its scale. A scale is never 0.

    Output: codes uint8 (N, ceil(K / 2)), the even k in the low half of a byte; scale (N, G) of
    ``scale_dtype``, float16's values in float32; zero uint8 (N, G), without elements where it is
    not stored: symmetric, nf4, fp4.
    """
    op = "rtn_quantize"
    _expect_weight(op, weight, group_size, scale_dtype)
    if codebook not in CODEBOOKS:
        reject(op, "codebook", " or ".join(map(repr, CODEBOOKS)), repr(codebook))
    if grid < 1:
        reject(op, "grid", "one candidate or more", grid)
    codes, scale = _outputs(weight, group_size, scale_dtype)
    has_zero = codebook == "int4" and not symmetric
    return codes, scale, _alloc.empty(scale.shape if has_zero else (0,), like=codes)


@define(
    "(Tensor weight, int group_size, bool round_zero, int iterations, float power, float beta, "
    "float kappa, ScalarType scale_dtype) -> (Tensor codes, Tensor scale, Tensor zero)"
)
def hqq_quantize(
    weight: torch.Tensor,
    group_size: int,
    round_zero: bool,
    iterations: int,
    power: float,
    beta: float,
    kappa: float,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """Half-quadratic quantization of weight (N, K) to int4 with a zero-point that is no integer.

    Per group s = (max w - min w) / 15 stays, rounded to ``scale_dtype``, and z starts as
    -min w / s. Then, i from 0, with c = clamp(rint(w / s + z), 0, 15) and e = w - s (c - z):

        W_e = sign(e) max(0, |e| - |e|^(power - 1) / beta_i),   beta_i = beta kappa^i
        z   = mean(c - (w - W_e) / s)

    The z with the least sum of |e|^power of ``iterations`` + 1 is kept, per group; it is rounded to
    ``scale_dtype`` before it is used. With ``round_zero`` the range is made to hold 0, and the
    better one of the two integers around that z takes its place. A group of one value v has s = 1,
    and z = -v; one that is not finite is as that of zeros with a NaN as its scale.

    Output: as of ``rtn_quantize``; zero (N, G) of the scale's dtype, uint8 with ``round_zero``.
    """
    op = "hqq_quantize"
    _expect_weight(op, weight, group_size, scale_dtype)
    if iterations < 0:
        reject(op, "iterations", "0 or more", iterations)
    for name, value in (("power", power), ("beta", beta), ("kappa", kappa)):
        if not 0 < value < float("inf"):
            reject(op, name, "a positive number", value)
    if power > 2:
        reject(op, "power", "at most 2", power, because="for the shrinkage to be defined")
    codes, scale = _outputs(weight, group_size, scale_dtype)
    return codes, scale, _alloc.empty(scale.shape, like=codes if round_zero else scale)


def _expect_weight(
    op: str, weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype
) -> None:
    expect_dense(op, None, weight=weight)
    expect_dtype(op, "weight", weight, FLOATS)
    expect_shape(op, "weight", weight, ("N", "K"))
    if group_size < 1:
        reject(op, "group_size", "at least 1", group_size)
    if scale_dtype not in SCALE_DTYPES:
        what = " or ".join(map(name_of, SCALE_DTYPES))
        reject(op, "scale_dtype", what, name_of(scale_dtype), error=TypeError)


def _outputs(
    weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    groups = (k + group_size - 1) // group_size
    stored = torch.bfloat16 if scale_dtype is torch.bfloat16 else torch.float32
    return (
        _alloc.empty((n, (k + 1) // 2), like=weight, dtype=torch.uint8),
        _alloc.empty((n, groups), like=weight, dtype=stored),
    )


for _name in ("rtn_quantize", "hqq_quantize"):
    not_differentiable(_name, "codes have no derivative")
