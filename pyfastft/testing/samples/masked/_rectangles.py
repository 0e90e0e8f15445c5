"""Trained parts of weights, of every layout, drawn the same at every call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyfastft.ops.masked._rectangles import matrix_of


@dataclass(frozen=True)
class Part:
    """So many rectangles of one size in a weight of that shape."""

    shape: tuple[int, ...]
    rows: int
    columns: int
    count: int
    dtype: torch.dtype = torch.int32
    large: bool = False

    def matrix(self) -> tuple[int, int]:
        """N and K."""
        return matrix_of(torch.empty(self.shape, device="meta"))

    def index(self, name: str, device: torch.device) -> torch.Tensor:
        """The offsets, drawn without repetition."""
        n, k = self.matrix()
        across = k // self.columns if self.columns else 0
        generator = torch.Generator().manual_seed(sum(name.encode()))
        total = across * (n // self.rows)
        places = torch.randperm(total, generator=generator)[: self.count].sort().values
        if not across:
            return torch.empty(0, dtype=self.dtype, device=device)
        offsets = places // across * self.rows * k + places % across * self.columns
        return offsets.to(device=device, dtype=self.dtype)


PARTS = {
    "elements": Part((7, 13), 1, 1, 11),
    "one-element": Part((3, 5), 1, 1, 1, torch.int64),
    "rows": Part((9, 17), 1, 17, 4),
    "columns": Part((19, 6), 19, 1, 3),
    "blocks": Part((12, 20), 3, 5, 6),
    "heads-of-rows": Part((12, 7), 4, 7, 2),
    "heads-of-columns": Part((7, 12), 7, 4, 2, torch.int64),
    "whole": Part((5, 9), 5, 9, 1),
    "every-element": Part((6, 7), 1, 1, 42),
    "none": Part((4, 6), 1, 1, 0),
    "vector": Part((23,), 1, 1, 5),
    "few-of-many": Part((130, 250), 1, 1, 330, torch.int64, True),
    "many-of-many": Part((130, 250), 1, 1, 16000, torch.int32, True),
    "wide-blocks": Part((128, 192), 64, 64, 4, torch.int32, True),
    "many-rows": Part((300, 120), 1, 120, 41, torch.int32, True),
    "many-columns": Part((120, 300), 120, 1, 41, torch.int32, True),
}
