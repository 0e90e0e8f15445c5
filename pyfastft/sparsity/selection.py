"""Sets chosen together over several weights, by one exact global threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._check import reject
from pyfastft.functional import masked as functional
from pyfastft.sparsity.set import SparseSet


def select(
    weights: Sequence[torch.Tensor],
    density: float,
    *,
    scored: Sequence[torch.Tensor] | None = None,
    score: str = "magnitude",
    largest: bool = True,
    others: Sequence[torch.Tensor] = (),
    per_tensor: bool = False,
) -> list[SparseSet]:
    """The entries of the largest (or smallest) scores of all weights, one set for each.

    Args:
        weights: what trains.
        density: the part of all entries, in [0, 1]; their number is rounded.
        scored: what the score is computed of, in place of the weights: their gradients (SAFT, FISH)
            or old values; of their shapes.
        score, largest, others: as :func:`pyfastft.functional.select_topk`.
        per_tensor: that part of each weight by itself, in place of all together.

    Raises:
        ValueError, TypeError: as :func:`pyfastft.functional.select_topk`, or density is no part.
    """
    if not 0 <= density <= 1:
        reject("select", "density", "0 to 1", density)
    tensors = list(weights if scored is None else scored)
    shapes = [tuple(weight.shape) for weight in weights]
    if [tuple(tensor.shape) for tensor in tensors] != shapes:
        reject("select", "scored", f"shapes {shapes}", [tuple(one.shape) for one in tensors])
    with torch.no_grad():
        if per_tensor:
            found = []
            for i, tensor in enumerate(tensors):
                k, other = round(density * tensor.numel()), list(others[i : i + 1])
                found += functional.select_topk(
                    tensor, k, score=score, largest=largest, others=other
                )
        else:
            k = round(density * sum(tensor.numel() for tensor in tensors))
            found = functional.select_topk(tensors, k, score=score, largest=largest, others=others)
    return [SparseSet(weight, index) for weight, index in zip(weights, found, strict=True)]
