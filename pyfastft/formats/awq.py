r"""AWQ checkpoints of AutoAWQ's GEMM version.

Per layer, of a weight (N, K) with G groups:

- ``qweight`` int32 (K, N / 8): eight outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from
  the lowest bits on;
- ``qzeros`` int32 (G, N / 8): zero-points in the same order; ``scales`` float16 (G, N).

.. math:: W_{nk} = s_{\lfloor k / g \rfloor n} (c_{kn} - z_{\lfloor k / g \rfloor n})
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pyfastft.formats._words import (
    CODES_PER_WORD,
    SCALES,
    Layer,
    codes_of,
    expect,
    group_size_of,
    implied,
    integer_zero,
    scale_as,
    stored_scale,
    take,
    words_of,
)
from pyfastft.quantization.tensor import QTensor4

__all__ = ["TENSORS", "decode", "encode"]

TENSORS = ("qweight", "qzeros", "scales")
# The output that each place of a word holds, and the place of each output.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(_ORDER.index(i) for i in range(CODES_PER_WORD))


def decode(tensors: Mapping[str, torch.Tensor], *, group_size: int | None = None) -> Layer:
    """The weight of one layer's tensors.

    Args:
        tensors: by the names of :data:`TENSORS`.
        group_size: checked where given; -1 is one group per output.

    Raises:
        ValueError: a tensor is missing or does not fit.
    """
    qweight, qzeros, scales = take(tensors, TENSORS)
    qweight = expect("qweight", qweight, (None, None), (torch.int32,))
    k, words = qweight.shape
    n = words * CODES_PER_WORD
    scales = expect("scales", scales, (None, n), SCALES)
    groups = scales.shape[0]
    qzeros = expect("qzeros", qzeros, (groups, words), (torch.int32,))
    weight = QTensor4.from_codes(
        _reordered(codes_of(qweight, n), _PLACES).T.contiguous(),
        stored_scale(scales.T),
        zero=implied(_reordered(codes_of(qzeros, n), _PLACES).T),
        group_size=group_size_of(k, groups, group_size),
    )
    return Layer(weight, {"scale_dtype": scales.dtype})


def encode(
    weight: QTensor4, *, scale_dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """The tensors of a weight, by the names of :data:`TENSORS`: the inverse of :func:`decode`.

    Raises:
        ValueError: the format cannot hold the weight as it is: nf4 or fp4, zero-points that are no
            integers, N no multiple of 8, an order of the inputs, a shorter last group, or scales
            that ``scale_dtype`` does not hold exactly.
    """
    zero = integer_zero(weight, "AWQ")
    if weight.n % CODES_PER_WORD:
        raise ValueError(f"expected N of a multiple of 8 for AWQ, got {weight.n}")
    if weight.perm is not None:
        raise ValueError("expected no order of the inputs for AWQ, which has no g_idx")
    if weight.groups > 1 and weight.k % weight.group_size:
        raise ValueError(
            f"expected groups of one size for AWQ, got {weight.group_size} of {weight.k}"
        )
    return {
        "qweight": words_of(_reordered(weight.unpack().T, _ORDER)),
        "qzeros": words_of(_reordered(zero.T, _ORDER)),
        "scales": scale_as(weight.scale, scale_dtype).T.contiguous(),
    }


def _reordered(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Codes (R, N), of every eight those of these places."""
    rows, n = codes.shape
    return codes.reshape(rows, n // CODES_PER_WORD, CODES_PER_WORD)[:, :, order].reshape(rows, n)
