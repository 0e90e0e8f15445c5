"""What all layers share whose weight is codes with scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

_AS_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class KeptBuffers(nn.Module):
    """Has buffers that stay as they are whatever dtype the module is cast to; what changes is
    ``dtype``, which ``weight`` is read in."""

    KEPT: ClassVar[tuple[str, ...]]
    _dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """What ``weight`` is read in: the original weight's dtype, or what the module was cast to
        since."""
        return self._dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A cast is meant for what is computed in. Integers pass through one unchanged.
        before = {name: b for name in self.KEPT if (b := self._buffers[name]) is not None}
        as_integers = {
            name: b.view(_AS_INTEGERS.get(b.dtype, b.dtype)) for name, b in before.items()
        }
        self._buffers.update(as_integers)
        try:
            super()._apply(fn, recurse)
            applied = {name: self._buffers[name] for name in before}
        except BaseException:
            self._buffers.update(before)
            raise
        for name, buffer in before.items():
            moved = applied[name]
            assert moved is not None
            if moved.dtype is not as_integers[name].dtype:  # type() casts integers too
                moved = as_integers[name].to(moved.device)
            self._buffers[name] = moved.view(buffer.dtype)
        device = next(iter(before.values())).device
        cast = fn(torch.empty(0, dtype=self._dtype, device=device)).dtype
        self._dtype = cast if cast.is_floating_point else self._dtype
        return self
