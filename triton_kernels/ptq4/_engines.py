"""What 4-bit weights can be multiplied by on Triton."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft.native._torch_int4 import LowRank, Weight
from pyfastft.triton_kernels._int4_engine import Choice
from pyfastft.triton_kernels.ptq4 import _gradient, _kernels


class TritonKernels:
    """The :class:`pyfastft.native._torch_int4.Int4Kernels` of a device of so many
    multiprocessors."""

    engines = ("panels", "product")

    def __init__(self, multiprocessors: int) -> None:
        self.multiprocessors = multiprocessors

    def dequantize(
        self,
        out: torch.Tensor,
        weight: Weight,
        *,
        first: int = 0,
        perm: torch.Tensor | None = None,
    ) -> None:
        """Columns of W; see the protocol."""
        _kernels.dequantize(out, weight, first=first, perm=perm)

    def linear(
        self,
        choice: Choice,
        *,
        y: torch.Tensor,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        splits: int,
    ) -> None:
        """y = x W^T + b by product, the only engine beside panels."""
        assert choice.tiles is not None
        operands: dict[str, Any] = {"y": y, "x": x, "weight": weight, "bias": bias}
        count = self.multiprocessors
        _kernels.product(**operands, tiles=choice.tiles, multiprocessors=count)

    def input_gradient(
        self,
        choice: Choice,
        *,
        dx: torch.Tensor,
        grad: torch.Tensor,
        weight: Weight,
        low_rank: LowRank | None,
    ) -> None:
        """dx = grad W + s dropout(t A) by product."""
        assert choice.tiles is not None
        operands: dict[str, Any] = {"dx": dx, "grad": grad, "weight": weight}
        operands |= {"low_rank": low_rank, "multiprocessors": self.multiprocessors}
        _gradient.input_gradient(**operands, tiles=choice.tiles)
