"""The one allocator of op outputs: contracts call it, tests poison it with NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def empty(
    shape: Sequence[int], *, like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An uninitialised C-contiguous tensor on ``like``'s device, of ``like``'s dtype unless named.

    Never ``empty_like``: outputs are contiguous whatever the strides of the inputs, so that real
    and fake tensors agree.
    """
    return like.new_empty(shape) if dtype is None else like.new_empty(shape, dtype=dtype)
