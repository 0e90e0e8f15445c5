"""Values made of a weight once, and made anew where the weight changed."""

from __future__ import annotations

from typing import Any

import torch

_ROWS = 256


class MadeOf:
    """Of which weight, and of which version of it, something was made.

    Neither an id nor an address would do, which a new weight may share with an old one. What
    changes a weight through ``.data`` leaves no trace.
    """

    weight: torch.Tensor | None = None
    version: int = -1

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether it was made of this weight as it is now."""
        return self.weight is weight and self.version == weight._version

    def note(self, weight: torch.Tensor) -> None:
        """It was made of this weight, now."""
        self.weight, self.version = weight, weight._version


class RowSquares(MadeOf):
    r"""The squares :math:`|W_n|^2` of the norms of a weight's rows, kept while W stays as it is.

    For the ``squared`` of :func:`pyfastft.functional.dora_linear` in a layer over a frozen weight.
    A copy, and a file, starts without a value.
    """

    def __init__(self) -> None:
        self._squares: torch.Tensor | None = None

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """|W_n|^2 of W (N, K), of shape (N,); float32, or float64 beside float64."""
        if torch.compiler.is_compiling():
            return _squares(weight)
        if self._squares is None or not self.is_of(weight):
            self._squares = _squares(weight)
            self.note(weight)
        return self._squares

    def __reduce__(self) -> tuple[Any, ...]:
        return RowSquares, ()


@torch.no_grad()
def _squares(weight: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    # Some rows at a time: no copy of the whole weight in another dtype.
    return torch.cat([rows.detach().to(wide).square().sum(1) for rows in weight.split(_ROWS)])
