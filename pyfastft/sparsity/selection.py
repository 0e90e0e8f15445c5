"""Sets chosen together over several weights, by one exact global threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._check import reject
from pyfastft.functional import masked as functional
from pyfastft.ops.masked._rectangles import matrix_of
from pyfastft.sparsity.layouts import blocks, columns, rows
from pyfastft.sparsity.set import SparseSet

# Of which layout the sets are whose groups are chosen whole.
GROUPED = ("rows", "columns", "blocks")


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


def group_scores(scored: torch.Tensor, layout: str, block: int = 1) -> torch.Tensor:
    """The mean magnitude of every row, column or block of a matrix (N, K), numbered as the layout's
    own function numbers them; float32.

    Raises:
        ValueError: the blocks do not tile the matrix.
    """
    matrix = scored.detach().reshape(matrix_of(scored)).float().abs()
    if layout != "blocks":
        return matrix.mean(1 if layout == "rows" else 0)
    n, k = matrix.shape
    if n % block or k % block:
        reject("group_scores", "block", f"a divisor of {n} and {k}", block)
    return matrix.view(n // block, block, k // block, block).mean((1, 3)).reshape(-1)


def select_groups(
    weights: Sequence[torch.Tensor],
    scores: Sequence[torch.Tensor],
    count: int,
    layout: str,
    block: int = 1,
) -> list[SparseSet]:
    """The rows, columns or blocks of the largest scores of all weights, as many as fit in ``count``
    entries; of equal scores the first.

    Args:
        weights: what trains.
        scores: of each weight as :func:`group_scores` gives them.
        count: the most entries.
        layout: "rows", "columns" or "blocks", of which ``block`` is the edge.
    """
    sizes = [
        weight.numel() // max(score.numel(), 1)
        for weight, score in zip(weights, scores, strict=True)
    ]
    lengths = [score.numel() for score in scores]
    order = torch.cat(list(scores)).sort(descending=True, stable=True).indices
    every = torch.repeat_interleave(torch.tensor(sizes), torch.tensor(lengths)).to(order.device)
    chosen = order[every[order].cumsum(0) <= count]
    found, first = [], 0
    for weight, length in zip(weights, lengths, strict=True):
        own = chosen[(chosen >= first) & (chosen < first + length)] - first
        first += length
        if layout == "blocks":
            found.append(blocks(weight, own, (block, block)))
        else:
            found.append((rows if layout == "rows" else columns)(weight, own))
    return found
