"""BlockPattern: which blocks of a weight there are."""

from __future__ import annotations

import torch

from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft.ops.prune._pattern import (
    blocks_of,
    dense_of,
    expect_index,
    grid_of,
    index_of_mask,
    on_grid,
    parts_of,
)

_OP = "BlockPattern"


class BlockPattern:
    """Which blocks of a weight W (N, K) there are, for :func:`pyfastft.functional.
    block_sparse_linear`.

    W is cut into blocks of one size, the last ones reaching beyond it where that does not divide N
    or K. Nothing but the index is held, checked here, once. Its first part is the usual CSR of the
    blocks; beside it stand their transpose, which refers to the same values, and the rows and the
    columns by descending number of blocks.

    Args:
        index: int32, as ``index`` of another pattern.
        shape: (N, K) of the weight.
        block: rows and columns of a block, each at least 1.

    Raises:
        ValueError: the index is not one of blocks in such a weight.
        TypeError: it is not a dense int32 tensor.
    """

    def __init__(
        self, index: torch.Tensor, *, shape: tuple[int, int], block: tuple[int, int]
    ) -> None:
        grid = _grid(shape, block)
        expect_dense(_OP, None, index=index)
        expect_dtype(_OP, "index", index, (torch.int32,))
        expect_shape(_OP, "index", index, ("size",))
        beside = index.shape[0] - 2 * (sum(grid) + 1)
        if beside < 0 or beside % 3:
            what = f"size {2 * (sum(grid) + 1)} and 3 for every block"
            reject(_OP, "index", what, index.shape[0])
        expect_index(_OP, index, grid)
        self.index = index
        self.shape, self.block = (int(shape[0]), int(shape[1])), (int(block[0]), int(block[1]))

    @classmethod
    def from_mask(
        cls, mask: torch.Tensor, *, shape: tuple[int, int], block: tuple[int, int]
    ) -> BlockPattern:
        """The blocks that a mask has.

        Args:
            mask: bool, one element for each block: of shape (ceil(N / rows), ceil(K / columns)).
            shape: (N, K) of the weight.
            block: rows and columns of a block.

        Raises:
            ValueError: the mask's shape does not fit.
            TypeError: it is not a dense tensor of bools.
        """
        grid = _grid(shape, block)
        expect_dense(_OP, None, mask=mask)
        expect_dtype(_OP, "mask", mask, (torch.bool,))
        expect_shape(_OP, "mask", mask, grid, "to have one element for each block")
        return cls(index_of_mask(mask), shape=shape, block=block)

    @classmethod
    def from_weight(cls, weight: torch.Tensor, *, block: tuple[int, int]) -> BlockPattern:
        """The blocks of a weight that are not zero.

        Args:
            weight: W of shape (N, K).
            block: rows and columns of a block.

        Raises:
            ValueError: W is no matrix.
            TypeError: it is not a dense tensor.
        """
        expect_dense(_OP, None, weight=weight)
        expect_shape(_OP, "weight", weight, ("N", "K"))
        shape = (weight.shape[0], weight.shape[1])
        _grid(shape, block)
        mask = (on_grid(weight.detach(), *block) != 0).any(-1).any(-1)
        return cls.from_mask(mask, shape=shape, block=block)

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return (self.index.shape[0] - 2 * (sum(self._grid) + 1)) // 3

    @property
    def density(self) -> float:
        """The part of all blocks that there are."""
        return self.blocks / max(1, self._grid[0] * self._grid[1])

    @property
    def row_offsets(self) -> torch.Tensor:
        """Where each row of blocks begins, and the number of blocks; int32."""
        return parts_of(self.index, *self._grid).row_offsets

    @property
    def column_indices(self) -> torch.Tensor:
        """The column of each block, counted in blocks; int32."""
        return parts_of(self.index, *self._grid).column_indices

    @property
    def _grid(self) -> tuple[int, int]:
        return grid_of(*self.shape, *self.block)

    def mask(self) -> torch.Tensor:
        """bool, one element for each block of W: whether it is there."""
        ones = torch.ones(self.blocks, 1, 1, dtype=torch.bool, device=self.index.device)
        return dense_of(ones, self.index, *self._grid)

    def values(self, weight: torch.Tensor) -> torch.Tensor:
        """The blocks of W, of shape (blocks, rows, columns), zero beyond W; a copy.

        Raises:
            ValueError: W is not of the pattern's shape.
            TypeError: it is not a dense tensor.
        """
        expect_dense(_OP, self.index.device, weight=weight)
        expect_shape(_OP, "weight", weight, self.shape, "to match the pattern")
        return blocks_of(weight, self.index, *self.block)

    def dense(self, values: torch.Tensor) -> torch.Tensor:
        """W of shape (N, K) from its blocks, zero elsewhere.

        Raises:
            ValueError: the values are not of the pattern's blocks.
            TypeError: they are not a dense tensor.
        """
        expect_dense(_OP, self.index.device, values=values)
        expect_shape(_OP, "values", values, (self.blocks, *self.block), "to match the pattern")
        return dense_of(values, self.index, *self.shape)

    def to(self, device: torch.device | str) -> BlockPattern:
        """The same on a device."""
        return type(self)(self.index.to(device), shape=self.shape, block=self.block)

    def __repr__(self) -> str:
        (n, k), (rows, columns) = self.shape, self.block
        return f"BlockPattern({self.blocks} blocks of {rows} x {columns} in {n} x {k})"


def _grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """The size of the grid; ValueError unless there can be one."""
    if len(block) != 2 or min(block) < 1:
        reject(_OP, "block", "two sizes of at least 1", tuple(block))
    if len(shape) != 2 or min(shape) < 0:
        reject(_OP, "shape", "(N, K)", tuple(shape))
    return grid_of(*shape, *block)
