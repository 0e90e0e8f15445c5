"""A config's way from a weight to a :class:`QTensor4`."""

from __future__ import annotations

import torch

from pyfastft.config import PTQ4
from pyfastft.functional import hqq_quantize, rtn_quantize
from pyfastft.quantization.tensor import QTensor4

__all__ = ["quantize_weight"]


def quantize_weight(weight: torch.Tensor, config: PTQ4) -> QTensor4:
    """A matrix (N, K) in 4 bits, as the config says.

    Raises:
        ValueError: a weight is not finite, or a group's range is beyond float32.
    """
    k = weight.shape[1]
    group_size = max(k, 1) if config.group_size == -1 else config.group_size
    scale_dtype = getattr(torch, config.scale_dtype)
    codebook = config.codebook
    if config.method == "rtn":
        codes, scale, zero = rtn_quantize(
            weight,
            group_size=group_size,
            codebook=codebook,
            symmetric=config.symmetric,
            grid=config.grid,
            scale_dtype=scale_dtype,
        )
    else:
        codes, scale, zero = hqq_quantize(
            weight,
            group_size=group_size,
            round_zero=config.round_zero,
            iterations=config.iterations,
            scale_dtype=scale_dtype,
        )
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("expected a weight of finite values, got a NaN or an infinity")
    return QTensor4(
        codes=codes, scale=scale, zero=zero, k=k, group_size=group_size, codebook=codebook
    )
