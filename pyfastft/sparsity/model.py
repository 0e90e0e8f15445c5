"""The sets of a whole model."""

from __future__ import annotations

from torch import nn

from pyfastft.sparsity.set import ATTRIBUTE, SparseSet


def sets_of(model: nn.Module) -> dict[str, SparseSet]:
    """The sets that train in a model, by the names of their weights in its state dict.

    A set whose weight has several names stands under the first of them. Empty where nothing of the
    model trains in part.
    """
    found: dict[str, SparseSet] = {}
    for prefix, module in model.named_modules():
        for values in module._parameters.values():
            one = getattr(values, ATTRIBUTE, None)
            if one is None or any(one is other for other in found.values()):
                continue
            own = next(name for name, p in module._parameters.items() if p is one.weight)
            found[f"{prefix}.{own}" if prefix else own] = one
    return found
