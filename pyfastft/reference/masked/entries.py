"""Gathering, scattering and merging by plain indexing."""

from __future__ import annotations

import torch

from pyfastft._op import implement
from pyfastft.ops.masked._rectangles import (
    check_index,
    expect_places,
    matrix_of,
    offsets_of,
    reject_grown,
)


@implement("masked_gather", "reference")
def masked_gather(
    values: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, rows: int, columns: int
) -> None:
    n, k = matrix_of(weight)
    check_index("masked_gather", index, rows, columns, n, k)
    values.copy_(weight.reshape(-1)[offsets_of(index, rows, columns, k)])


@implement("masked_scatter_", "reference")
def masked_scatter_(
    weight: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    rows: int,
    columns: int,
    alpha: float | None,
) -> None:
    n, k = matrix_of(weight)
    check_index("masked_scatter_", index, rows, columns, n, k)
    offsets, flat = offsets_of(index, rows, columns, k), weight.view(-1)
    if alpha is not None:
        wide = torch.promote_types(values.dtype, torch.float32)
        values = flat[offsets].to(wide) + alpha * values.to(wide)
    flat[offsets] = values.to(weight.dtype)


@implement("masked_merge", "reference")
def masked_merge(
    merged: torch.Tensor,
    source: torch.Tensor,
    index: torch.Tensor,
    kept: torch.Tensor,
    grown: torch.Tensor,
) -> None:
    expect_places(index, kept)
    entries, order = torch.sort(torch.cat((index[kept], grown)), stable=True)
    if bool((entries[1:] == entries[:-1]).any()) or bool((grown[1:] <= grown[:-1]).any()):
        reject_grown()
    merged.copy_(entries)
    source.copy_(torch.cat((kept, torch.full_like(grown, -1, dtype=torch.int64)))[order])
