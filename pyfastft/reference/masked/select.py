"""select_topk by sorting a score tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.ops.masked._rectangles import check_index, matrix_of
from pyfastft.reference._dropout import philox4x32


def scores_of(
    tensor: torch.Tensor, other: torch.Tensor | None, score: str, first: int, rng: torch.Tensor
) -> torch.Tensor:
    """The scores of a tensor's elements, of which ``first`` others stand before it; flat."""
    if score == "random":
        position = first + torch.arange(tensor.numel(), device=tensor.device)
        words = torch.stack(philox4x32(rng[0], position // 4, rng[1]), dim=-1)
        return words.gather(-1, position[:, None] % 4)[:, 0]
    a = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if score == "wanda":
        assert other is not None
        return (a.reshape(matrix_of(tensor)).abs() * other).reshape(-1)
    b = a if other is None else other.to(a.dtype)
    result = {
        "magnitude": lambda: a.abs(),
        "square": lambda: a * a,
        "value": lambda: a,
        "product": lambda: (a * b).abs(),
        "movement": lambda: -(a * b),
        "difference": lambda: (a - b).abs(),
    }[score]()
    return result.reshape(-1)


@implement("select_topk", "reference")
def select_topk(
    index: torch.Tensor,
    counts: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    exclude: Sequence[torch.Tensor],
    k: int,
    score: str,
    largest: bool,
    rng: torch.Tensor,
) -> None:
    scores, ends, first = [], [], 0
    for i, tensor in enumerate(tensors):
        scores.append(scores_of(tensor, others[i] if others else None, score, first, rng))
        first += tensor.numel()
        ends.append(first)
    every = torch.cat(scores)
    allowed = torch.ones(first, dtype=torch.bool, device=every.device)
    for i, left_out in enumerate(exclude):
        check_index("select_topk", left_out, 1, 1, 1, tensors[i].numel(), "exclude")
        allowed[ends[i] - tensors[i].numel() + left_out.long()] = False
    positions = allowed.nonzero()[:, 0]
    own = every[positions]
    order = torch.argsort(own, descending=largest, stable=True)
    nan = own[order] != own[order]
    best = order[torch.argsort(nan.to(torch.uint8), stable=True)][:k]
    index.copy_(positions[best].sort().values)
    edges = torch.searchsorted(index, torch.tensor([0, *ends], device=index.device))
    counts.copy_(edges.diff())
