r"""GPTQ checkpoints, as AutoGPTQ (format 1) and GPTQModel (format 2) write them.

Per layer, of a weight (N, K) with G groups:

- ``qweight`` int32 (K / 8, N): eight codes along K in a word, the first in the lowest bits;
- ``qzeros`` int32 (G, N / 8): eight zero-points along N in a word; format 1 holds z - 1;
- ``scales`` float16 (G, N); ``g_idx`` int32 (K): the group of each input.

.. math:: W_{nk} = s_{g_k n} (c_{kn} - z_{g_k n})

Format 1 has a trap: a zero-point of 0 becomes -1, and the usual writer, which does not mask it,
sets all higher bits of its word; and readers disagree on whether it means 0 or 16. Here it is read
as 0, and told of. Symmetric checkpoints, whose zero-points are all 8, are not concerned.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from pyfastft.formats._words import (
    CODES_PER_WORD,
    SCALES,
    Layer,
    bytes_of,
    codes_of,
    expect,
    group_index,
    group_size_of,
    implied,
    in_input_order,
    integer_zero,
    order_of,
    scale_as,
    stored_scale,
    take,
    words_of,
)
from pyfastft.quantization.tensor import QTensor4, unpack_codes

__all__ = ["TENSORS", "decode", "encode"]

TENSORS = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = ("gptq", "gptq_v2")


def decode(
    tensors: Mapping[str, torch.Tensor],
    *,
    checkpoint_format: str = "gptq",
    group_size: int | None = None,
) -> Layer:
    """The weight of one layer's tensors.

    Args:
        tensors: by the names of :data:`TENSORS`; ``g_idx`` may be missing.
        checkpoint_format: ``"gptq"``, format 1, or ``"gptq_v2"``.
        group_size: checked where given; needed where groups are not of one size and there is no
            ``g_idx``. -1 is one group per output.

    Raises:
        ValueError: a tensor is missing or does not fit.

    Warns:
        UserWarning: zero-points may have been damaged by their writer, or be of the other format.
    """
    _expect_format(checkpoint_format)
    qweight, qzeros, scales, g_idx = take(tensors, TENSORS[:3], TENSORS[3:])
    qweight = expect("qweight", qweight, (None, None), (torch.int32,))
    rows, n = qweight.shape
    k = rows * CODES_PER_WORD
    scales = expect("scales", scales, (None, n), SCALES)
    groups = scales.shape[0]
    if n % CODES_PER_WORD:
        raise ValueError(f"expected qweight of a multiple of 8 columns, got {n}")
    qzeros = expect("qzeros", qzeros, (groups, n // CODES_PER_WORD), (torch.int32,))
    perm = None
    if g_idx is None:
        size = group_size_of(k, groups, group_size)
    else:
        g_idx = expect("g_idx", g_idx, (k,), (torch.int32,))
        size, perm = order_of(g_idx, groups)
        if group_size is not None:
            size = group_size_of(k, groups, group_size)
            if perm is None and not torch.equal(g_idx.long(), torch.arange(k) // size):
                raise ValueError(f"expected g_idx of groups of {group_size}, got others")
    stored = codes_of(qzeros, n)
    _warn_of_zeros(qzeros, stored, checkpoint_format)
    zero = (stored + 1) & 15 if checkpoint_format == "gptq" else stored
    codes = bytes_of(qweight.T)
    fields: dict[str, Any] = {
        "scale": stored_scale(scales.T),
        "zero": implied(zero.T),
        "group_size": size,
        "perm": perm,
    }
    options = {
        "checkpoint_format": checkpoint_format,
        "scale_dtype": scales.dtype,
        "with_g_idx": g_idx is not None,
    }
    if perm is None:
        return Layer(QTensor4(codes=codes, k=k, **fields), options)
    return Layer(QTensor4.from_codes(unpack_codes(codes, k)[:, perm.long()], **fields), options)


def encode(
    weight: QTensor4,
    *,
    checkpoint_format: str = "gptq",
    scale_dtype: torch.dtype = torch.float16,
    with_g_idx: bool = True,
) -> dict[str, torch.Tensor]:
    """The tensors of a weight, by the names of :data:`TENSORS`: the inverse of :func:`decode`.

    Raises:
        ValueError: the format cannot hold the weight as it is: nf4 or fp4, zero-points that are no
            integers, N or K no multiples of 8, an order without ``g_idx``, or scales that
            ``scale_dtype`` does not hold exactly.

    Warns:
        UserWarning: a zero-point is 0, which readers of format 1 disagree on.
    """
    _expect_format(checkpoint_format)
    zero = integer_zero(weight, "GPTQ")
    if weight.n % CODES_PER_WORD or weight.k % CODES_PER_WORD:
        raise ValueError(f"expected N and K of multiples of 8 for GPTQ, got {tuple(weight.shape)}")
    if weight.perm is not None and not with_g_idx:
        raise ValueError("expected with_g_idx=True beside an order of the inputs")
    if checkpoint_format == "gptq":
        if bool((zero == 0).any()):
            warnings.warn(
                "GPTQ: readers of checkpoint_format 'gptq' disagree on zero-points of 0, "
                "write 'gptq_v2'",
                stacklevel=2,
            )
        zero = (zero - 1) & 15  # uint8 wraps
    tensors = {
        "qweight": words_of(in_input_order(weight)).T.contiguous(),
        "qzeros": words_of(zero.T.contiguous()),
        "scales": scale_as(weight.scale, scale_dtype).T.contiguous(),
    }
    if with_g_idx:
        tensors["g_idx"] = group_index(weight)
    return tensors


def _warn_of_zeros(words: torch.Tensor, stored: torch.Tensor, checkpoint_format: str) -> None:
    usual, other = (7, 8) if checkpoint_format == "gptq" else (8, 7)
    if stored.numel() and bool((stored == other).all()):
        warnings.warn(
            f"GPTQ: every zero-point is stored as {other}, where checkpoint_format "
            f"{checkpoint_format!r} stores {usual} for symmetric weights; it may be mislabelled",
            stacklevel=3,
        )
    # The highest code of a word is 15 where its sign bit and the three below are set.
    suspects = int((words >> 28 == -1).sum()) if checkpoint_format == "gptq" else 0
    if suspects:
        warnings.warn(
            f"GPTQ: {suspects} words of qzeros end in 15: zero-points of 0, which readers of "
            "checkpoint_format 'gptq' disagree on and whose writer may have overwritten their "
            "neighbours; they are read as 0",
            stacklevel=3,
        )


def _expect_format(checkpoint_format: str) -> None:
    if checkpoint_format not in FORMATS:
        what = " or ".join(map(repr, FORMATS))
        raise ValueError(f"expected checkpoint_format of {what}, got {checkpoint_format!r}")
