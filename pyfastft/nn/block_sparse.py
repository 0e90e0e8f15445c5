"""A linear layer whose weight is made of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyfastft import functional
from pyfastft._check import expect_dtype, expect_shape
from pyfastft.nn._stand_in import HOOKS
from pyfastft.pruning.pattern import BlockPattern

__all__ = ["BlockSparseLinear"]


class BlockSparseLinear(nn.Module):
    r"""``nn.Linear`` of whose weight there are some blocks; the others are zero and cost nothing.

    .. math:: y = x W^T + b, \qquad W_{ij} = \mathrm{values}_{\mathrm{pattern}(i, j)}

    ``values`` and ``bias`` train. The state dict has these two, and ``index``, the pattern's, a
    buffer; loading one checks it. See :func:`pyfastft.functional.block_sparse_linear`.

    Args:
        values: the blocks, of shape (blocks, rows, columns).
        pattern: which blocks of W (N, K) there are.
        bias: b of shape (N,).

    Shape:
        x (..., K) to y (..., N), both of the values' dtype.

    Raises:
        ValueError: a shape does not fit.
        TypeError: the bias is of another dtype than the values.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    index: torch.Tensor

    def __init__(
        self, values: torch.Tensor, pattern: BlockPattern, *, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        what = type(self).__name__
        shape = (pattern.blocks, *pattern.block)
        expect_shape(what, "values", values, shape, "to match the pattern")
        self.out_features, self.in_features = pattern.shape
        if bias is not None:
            expect_shape(what, "bias", bias, (self.out_features,), "to match the pattern")
            expect_dtype(what, "bias", bias, (values.dtype,), "to match values")
        self.pattern = pattern
        self.values = _parameter(values)
        self.register_parameter("bias", None if bias is None else _parameter(bias))
        self.register_buffer("index", pattern.index)

    @classmethod
    def in_place_of(
        cls, base: nn.Linear, values: torch.Tensor, pattern: BlockPattern
    ) -> BlockSparseLinear:
        """A layer with another's bias, hooks and mode, which trains where that one's weight does.

        Raises:
            ValueError, TypeError: as the class.
        """
        layer = cls(values, pattern, bias=base.bias)
        layer.values.requires_grad_(base.weight.requires_grad)
        for hooks in HOOKS:
            layer.__dict__[hooks] = base.__dict__[hooks]
        return layer.train(base.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return functional.block_sparse_linear(x, self.values, self.pattern, bias=self.bias)

    def dense(self) -> torch.Tensor:
        """W of shape (N, K)."""
        return self.pattern.dense(self.values)

    def _follow(self) -> None:
        """Make the pattern that of the index as it is now."""
        self.pattern = BlockPattern(self.index, shape=self.pattern.shape, block=self.pattern.block)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._follow()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}index")
        if given is not None and given.shape == self.index.shape:
            BlockPattern(given, shape=self.pattern.shape, block=self.pattern.block)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._follow()

    def extra_repr(self) -> str:
        """Sizes, and the blocks."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, pattern={self.pattern!r}"
        )


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
