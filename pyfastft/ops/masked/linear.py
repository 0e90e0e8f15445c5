"""masked_linear: a plain linear layer of which only some of the weight's entries train."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from pyfastft._check import reject
from pyfastft.ops.masked.weight_grad import masked_weight_grad


class MaskedLinearFunction(torch.autograd.Function):
    """y = x W^T + b; the gradient of W goes to ``values`` at the trained entries and nowhere else.

    The values are W's own entries: the forward reads them there. Of x only ``saved`` columns are
    kept for the backward where they are given; ``index`` then lies in (N, saved columns).
    """

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        values: torch.Tensor,
        index: torch.Tensor,
        rows: int,
        columns: int,
        saved: torch.Tensor | None,
    ) -> torch.Tensor:
        if weight.requires_grad:
            because = "because its gradient is never formed"
            reject("masked_linear", "weight", "requires_grad False", True, because=because)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, bias, _, index, ctx.rows, ctx.columns, saved = inputs
        need_x, _, ctx.need_bias, need_values = ctx.needs_input_grad[:4]
        kept = None
        if need_values:
            kept = x if saved is None else _columns_of(x, saved)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(kept, weight if need_x else None, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, weight, index = ctx.saved_tensors
        dx = None if weight is None else grad @ weight
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.need_bias else None
        dvalues = None
        if kept is not None:
            dvalues = masked_weight_grad(grad, kept, index, ctx.rows, ctx.columns)
        return dx, None, dbias, dvalues, None, None, None, None


class _Slice:
    """The columns that were taken last, of what and while it was what; nothing is kept alive."""

    def __init__(self, x: torch.Tensor, saved: torch.Tensor, kept: torch.Tensor) -> None:
        self.x, self.saved, self.kept = map(weakref.ref, (x, saved, kept))
        self.version = x._version

    def find(self, x: torch.Tensor, saved: torch.Tensor) -> torch.Tensor | None:
        """They, where these are their x and columns."""
        same = self.x() is x and self.saved() is saved and self.version == x._version
        return self.kept() if same else None


_last: _Slice | None = None


def _columns_of(x: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """Columns of x. Layers that read one x and train the same columns of it, as those of queries,
    keys and values may, have one copy of them."""
    global _last
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or captured or x.is_inference():
        return x.index_select(-1, saved)
    last = _last
    kept = None if last is None else last.find(x, saved)
    if kept is None:
        kept = x.index_select(-1, saved)
        _last = _Slice(x, saved, kept)
    return kept
