r"""compressed-tensors checkpoints in the format ``pack-quantized``, as llm-compressor writes them.

Per layer, of a weight (N, K) with G groups:

- ``weight_packed`` int32 (N, ceil(K / 8)): eight codes along K in a word, the first in the lowest
  bits, the rest of a row's last word zeros; a code is a signed integer plus 8;
- ``weight_scale`` (N, G); ``weight_shape`` int64 (2): N and K;
- ``weight_zero_point`` int32 (ceil(N / 8), G) where weights are asymmetric: eight zero-points along
  N in a word, plus 8 too;
- ``weight_g_idx`` int32 (K) where inputs were reordered: the group of each input, -1 for none.

.. math:: W_{nk} = s_{n g_k} (c_{nk} - z_{n g_k})
"""

from __future__ import annotations

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

TENSORS = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
)


def decode(tensors: Mapping[str, torch.Tensor], *, group_size: int | None = None) -> Layer:
    """The weight of one layer's tensors.

    Args:
        tensors: by the names of :data:`TENSORS`; the last two may be missing.
        group_size: checked where given; -1 is one group per output.

    Raises:
        ValueError: a tensor is missing or does not fit.
    """
    packed, scale, shape, zero, g_idx = take(tensors, TENSORS[:3], TENSORS[3:])
    shape = expect("weight_shape", shape, (2,), (torch.int64, torch.int32))
    n, k = shape.tolist()
    # Before they are multiplied by anything: a hostile file may name any number.
    packed = expect("weight_packed", packed, (n, -(-k // CODES_PER_WORD)), (torch.int32,))
    scale = expect("weight_scale", scale, (n, None), SCALES)
    groups = scale.shape[1]
    options: dict[str, Any] = {
        "scale_dtype": scale.dtype,
        "shape_dtype": shape.dtype,
        "with_zero_point": zero is not None,
        "with_g_idx": g_idx is not None,
    }
    size, perm = group_size_of(k, groups, group_size) if g_idx is None else 0, None
    if g_idx is not None:
        g_idx = expect("weight_g_idx", g_idx, (k,), (torch.int32,))
        if bool((g_idx == -1).all()):
            size = group_size_of(k, groups, group_size)
            options["with_g_idx"] = "unused"
        else:
            size, perm = order_of(g_idx, groups)
    codes = unpack_codes(bytes_of(packed), k)
    if zero is not None:
        words = -(-n // CODES_PER_WORD)
        zero = expect("weight_zero_point", zero, (words, groups), (torch.int32,))
        zero = codes_of(zero.T, n).T
    weight = QTensor4.from_codes(
        codes if perm is None else codes[:, perm.long()],
        stored_scale(scale),
        zero=zero,
        perm=perm,
        group_size=size,
    )
    return Layer(weight, options)


def encode(
    weight: QTensor4,
    *,
    scale_dtype: torch.dtype | None = None,
    shape_dtype: torch.dtype = torch.int64,
    with_zero_point: bool | None = None,
    with_g_idx: bool | str | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a weight, by the names of :data:`TENSORS`: the inverse of :func:`decode`.

    Args:
        scale_dtype: of the scales in the file; the weight's own where absent.
        shape_dtype: of ``weight_shape``.
        with_zero_point: write zero-points; by default where the weight has some.
        with_g_idx: write the groups of the inputs; by default where the weight has an order.
            ``"unused"`` writes -1 for each.

    Raises:
        ValueError: the format cannot hold the weight as it is: nf4 or fp4, zero-points that are no
            integers, or scales that ``scale_dtype`` does not hold exactly; or something that the
            weight has would not be written.
    """
    zero = integer_zero(weight, "compressed-tensors")
    with_zero_point = weight.zero is not None if with_zero_point is None else with_zero_point
    with_g_idx = weight.perm is not None if with_g_idx is None else with_g_idx
    if weight.zero is not None and not with_zero_point:
        raise ValueError("expected with_zero_point=True beside zero-points")
    if weight.perm is not None and with_g_idx is not True:
        raise ValueError("expected with_g_idx=True beside an order of the inputs")
    tensors = {
        "weight_packed": words_of(in_input_order(weight)),
        "weight_scale": scale_as(weight.scale, scale_dtype or weight.scale.dtype),
        "weight_shape": torch.tensor(tuple(weight.shape), dtype=shape_dtype),
    }
    if with_zero_point:
        tensors["weight_zero_point"] = words_of(zero.T.contiguous()).T.contiguous()
    if with_g_idx:
        index = group_index(weight)
        tensors["weight_g_idx"] = torch.full_like(index, -1) if with_g_idx == "unused" else index
    return tensors
