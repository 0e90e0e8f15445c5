"""A linear layer of which a part of the weight trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pyfastft._check import reject
from pyfastft.nn._stand_in import StandIn, why_not_kind, why_not_weight
from pyfastft.sparsity.set import SparseSet

__all__ = ["MaskedLinear"]


class MaskedLinear(StandIn):
    r"""``nn.Linear`` of whose weight only the entries S of a set train.

    .. math:: y = x W^T + b, \quad
        \frac{\partial L}{\partial \mathrm{values}} = (dY^T X)|_S

    ``weight`` and ``bias`` are the base layer's own Parameters; the forward is the plain one and
    reads the trained entries there. ``values`` are the set's masters: the parameter that trains,
    stepped together with the weight by an optimizer of :mod:`pyfastft.optim`. The state dict has
    the base's names alone, and loading one makes the masters what it holds: of half precision they
    begin anew from the rounded weight. Moving the layer to another dtype keeps the masters.

    Args:
        base: the layer to stand in for; it is kept, and :meth:`restore` gives it back.
        trained: S, of the base's weight.

    Shape:
        x (..., K) to y (..., N), both of the base's dtype. Of x the columns are saved that have a
        trained entry, where at most half do; else x itself.

    Raises:
        TypeError: the base cannot be stood in for; says why.
        ValueError: the set is of another weight.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    values: nn.Parameter

    def __init__(self, base: nn.Module, trained: SparseSet) -> None:
        super().__init__()
        if why := self.why_not(base):
            raise TypeError(f"MaskedLinear: expected base of type nn.Linear, {why}")
        if trained.weight is not base.weight:
            reject("MaskedLinear", "trained", "a set of the base's weight", repr(trained))
        self._stand_in_for(base)
        self.trained = trained
        self.register_parameter("values", trained.values)
        self.out_features, self.in_features = self.weight.shape

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why this layer cannot stand in for the module; None where it can."""
        if why := why_not_kind(module, (nn.Linear,)) or why_not_weight(module):
            return why
        weight = module._parameters["weight"]
        assert weight is not None
        if weight.is_meta:
            return "its weight is on the meta device"
        return None if weight.is_contiguous() else f"its weight has strides {weight.stride()}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        if torch.is_grad_enabled() and self.values.requires_grad:
            return self.trained.linear(x, self.bias)
        return nn.functional.linear(x, self.weight, self.bias)

    @contextlib.contextmanager
    def _without_values(self) -> Iterator[None]:
        values = self._parameters.pop("values")
        try:
            yield
        finally:
            self._parameters["values"] = values

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = self.weight.dtype
        with self._without_values():
            super()._apply(fn, recurse)
        self.trained.follow(self.weight)
        if self.weight.dtype is not before:
            self.trained.write()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._without_values():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        with self._without_values():
            super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}weight" in state_dict:
            self.trained.follow(self.weight)
            self.trained.read()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.trained._own(self.values)

    def extra_repr(self) -> str:
        """The base's own description, and the set's."""
        return f"{self.base.extra_repr()}, trained={self.trained!r}"
