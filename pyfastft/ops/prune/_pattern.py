"""Which blocks of a weight there are: the index, its checks, and the weight's two forms.

A weight (N, K) is cut into a grid of R x C blocks of ``rows`` x ``columns``; where these do not
divide N or K, the last ones reach beyond W, and what of their values lies there is not part of it.
The blocks that there are have numbers, row of the grid by row. One int32 tensor indexes them:

    row_offsets     (R + 1)   the first block of each row of the grid, and their number
    column_indices  (blocks)  the column of each block, ascending within a row
    row_order       (R)       the rows, those with the most blocks first
    column_offsets  (C + 1)   the same three by columns: where a column's entries begin,
    row_indices     (blocks)  the row of each entry, ascending within a column,
    column_order    (C)       and the columns, those with the most blocks first
    places          (blocks)  the number of the block at each entry of a column
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject


class Parts(NamedTuple):
    """The parts of an index, views of it; see the module."""

    row_offsets: torch.Tensor
    column_indices: torch.Tensor
    row_order: torch.Tensor
    column_offsets: torch.Tensor
    row_indices: torch.Tensor
    column_order: torch.Tensor
    places: torch.Tensor


def grid_of(n: int, k: int, rows: int, columns: int) -> tuple[int, int]:
    """R and C."""
    return (n + rows - 1) // rows, (k + columns - 1) // columns


def expect_values(op: str, lead_name: str, lead: torch.Tensor, values: torch.Tensor) -> None:
    """values (blocks, rows, columns) of the first argument's dtype."""
    expect_dense(op, lead.device, values=values)
    if values.dim() != 3:
        expect_shape(op, "values", values, ("blocks", "rows", "columns"))
    expect_dtype(op, "values", values, (lead.dtype,), f"to match {lead_name}")
    if values.shape[1] < 1 or values.shape[2] < 1:
        reject(op, "values", "blocks of at least 1 x 1", tuple(values.shape))


def expect_size(op: str, index: torch.Tensor, values: torch.Tensor, n: int, k: int) -> None:
    """An index as large as that of these blocks; its content is not read."""
    expect_dense(op, values.device, index=index)
    expect_dtype(op, "index", index, (torch.int32,))
    blocks, rows, columns = values.shape
    over_n, over_k = grid_of(n, k, rows, columns)
    because = f"for {blocks} blocks on a grid of {over_n} x {over_k}"
    expect_shape(op, "index", index, (3 * blocks + 2 * (over_n + over_k + 1),), because)


def parts_of(index: torch.Tensor, over_n: int, over_k: int) -> Parts:
    """The parts of an index on an R x C grid."""
    blocks = (index.shape[0] - 2 * (over_n + over_k + 1)) // 3
    return Parts(*index.split([over_n + 1, blocks, over_n, over_k + 1, blocks, over_k, blocks]))


def index_of_mask(mask: torch.Tensor) -> torch.Tensor:
    """The index of the blocks that a mask (R, C) has."""
    row_indices, column_indices = mask.nonzero().unbind(1)
    return _index_of(row_indices, column_indices, (mask.shape[0], mask.shape[1]))


def _index_of(
    row_indices: torch.Tensor, column_indices: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """The index of blocks in ascending order, given the row and the column of each, int64."""
    by_rows = _listed(row_indices, grid[0])
    places = torch.argsort(column_indices, stable=True)
    by_columns = _listed(column_indices, grid[1])
    forth = (by_rows[0], column_indices, by_rows[1])
    return torch.cat((*forth, by_columns[0], row_indices[places], by_columns[1], places)).int()


def _listed(lines: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the line of each block: where the lines begin, and the lines by descending number."""
    counts = torch.bincount(lines, minlength=count)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return offsets, torch.argsort(counts, descending=True, stable=True)


def check_index(op: str, index: torch.Tensor, grid: tuple[int, int]) -> None:
    """ValueError unless the index is one of blocks in an R x C grid."""
    parts = parts_of(index, *grid)
    offsets, columns = parts.row_offsets.long(), parts.column_indices.long()
    blocks = columns.shape[0]
    counts = offsets[1:] - offsets[:-1]
    if int(offsets[0]) != 0 or int(offsets[-1]) != blocks or bool((counts < 0).any()):
        reject(op, "index", f"row offsets that ascend from 0 to {blocks}", offsets.tolist()[:8])
    if blocks and (int(columns.min()) < 0 or int(columns.max()) >= grid[1]):
        got = f"columns from {int(columns.min())} to {int(columns.max())}"
        reject(op, "index", f"columns within {grid[1]}", got)
    rows = torch.repeat_interleave(counts)
    at = rows * grid[1] + columns
    if bool((at[1:] <= at[:-1]).any()):
        reject(op, "index", "columns that ascend in each row", "a column not above the one before")
    if not torch.equal(_index_of(rows, columns, grid), index):
        reject(op, "index", "columns and orders that follow from its rows", "others")


# Indices that were found to fit, and where: a training step has the same ones every time.
_checked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def expect_index(op: str, index: torch.Tensor, grid: tuple[int, int]) -> None:
    """:func:`check_index`, once for each index that has not changed since."""
    if index.is_inference():  # has no version to tell a change by
        check_index(op, index, grid)
        return
    fits = (index._version, index.data_ptr(), grid)
    if _checked.get(index) != fits:
        check_index(op, index, grid)
        _checked[index] = fits


def dense_of(values: torch.Tensor, index: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """W (N, K) of its blocks, zero elsewhere."""
    _, rows, columns = values.shape
    over_n, over_k = grid_of(n, k, rows, columns)
    whole = values.new_zeros(over_n, over_k, rows, columns)
    whole[_positions(index, over_n, over_k)] = values
    return whole.transpose(1, 2).reshape(over_n * rows, over_k * columns)[:n, :k].contiguous()


def blocks_of(weight: torch.Tensor, index: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The values of the blocks of W (N, K), zero beyond W."""
    grid = grid_of(weight.shape[0], weight.shape[1], rows, columns)
    return on_grid(weight, rows, columns)[_positions(index, *grid)]


def _positions(index: torch.Tensor, over_n: int, over_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and the column of every block."""
    parts = parts_of(index, over_n, over_k)
    offsets = parts.row_offsets.long()
    return torch.repeat_interleave(offsets[1:] - offsets[:-1]), parts.column_indices.long()


def on_grid(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """W (N, K) as (R, C, rows, columns), zero beyond it."""
    n, k = weight.shape
    over_n, over_k = grid_of(n, k, rows, columns)
    beyond = (0, over_k * columns - k, 0, over_n * rows - n)
    whole = torch.nn.functional.pad(weight, beyond)
    return whole.view(over_n, rows, over_k, columns).transpose(1, 2)
