"""Sets that change: dropping and growing entries, and perturbations that are taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from pyfastft._check import reject
from pyfastft.functional import masked as functional
from pyfastft.sparsity.set import SparseSet


@torch.no_grad()
def regrow(
    sets: Sequence[SparseSet],
    scores: Sequence[torch.Tensor],
    count: int,
    *,
    base: Sequence[torch.Tensor] | None = None,
    dropped_to: str = "keep",
    optimizer: torch.optim.Optimizer | None = None,
    seeds: dict[str, Sequence[torch.Tensor]] | None = None,
) -> list[torch.Tensor]:
    """Drop ``count`` entries of the smallest magnitude and grow as many, over all sets together.

    The entries grown are those of the largest :math:`|score|` that no set had. Values and an
    optimizer's state follow the entries that stay; the state of those grown is zero, or seeded.

    Args:
        sets: of single elements; their weights, values and indices change.
        scores: a tensor of each weight's shape, usually a dense gradient.
        count: how many of all entries.
        base: the weights' values before training, of their shapes: magnitude is then that of
            the change, and a dropped entry returns to it with ``dropped_to="base"`` (SpIEL).
        dropped_to: what becomes of a weight's dropped entry: "keep" it, "zero" (RigL, SET), or
            "base".
        optimizer: of :mod:`pyfastft.optim`; its state follows.
        seeds: for names of its state (e.g. "exp_avg") one tensor of each weight's shape, read at
            the entries grown.

    Returns:
        For each set where its entries come from: places in the old one, -1 where grown.

    Raises:
        ValueError: a set is not of elements, a shape does not fit, or count is more than the
            entries in or outside of the sets.
    """
    op = "regrow"
    if any(one.rows * one.columns != 1 for one in sets):
        reject(op, "sets", "single elements", [one.layout for one in sets])
    if dropped_to not in ("keep", "zero", "base") or (dropped_to == "base" and base is None):
        reject(op, "dropped_to", "keep, zero, or base beside one", repr(dropped_to))
    if count > sum(map(len, sets)):
        reject(op, "count", f"at most {sum(map(len, sets))}, the entries that train", count)
    values = [one.values.detach() for one in sets]
    old = [] if base is None else [
        functional.masked_gather(start, one.index).to(one.values.dtype)
        for start, one in zip(base, sets, strict=True)
    ]  # fmt: skip
    kept = functional.select_topk(
        values,
        sum(map(len, sets)) - count,
        score="magnitude" if base is None else "difference",
        others=old,
    )
    grown = functional.select_topk(list(scores), count, exclude=[one.index for one in sets])
    sources = []
    for i, one in enumerate(sets):
        if dropped_to != "keep":
            stays = torch.zeros(len(one), dtype=torch.bool, device=one.index.device)
            stays[kept[i]] = True
            dropped = one.index[~stays]
            back = one.weight.new_zeros(dropped.shape)
            if dropped_to == "base":
                assert base is not None
                back = functional.masked_gather(base[i], dropped).to(one.weight.dtype)
            functional.masked_scatter_(one.weight, back, dropped)
        index, source = functional.masked_merge(one.index, kept[i], grown[i].to(one.index.dtype))
        _move(one, index, source, optimizer, i, seeds or {})
        sources.append(source)
    return sources


def _move(
    one: SparseSet,
    index: torch.Tensor,
    source: torch.Tensor,
    optimizer: torch.optim.Optimizer | None,
    number: int,
    seeds: dict[str, Sequence[torch.Tensor]],
) -> None:
    """Give a set its new index; values, gradient and state follow."""
    stays, place = source >= 0, source.clamp(min=0)

    def carried(old: torch.Tensor, fresh: torch.Tensor | float) -> torch.Tensor:
        if not old.numel():
            return torch.zeros_like(source, dtype=old.dtype) + fresh
        return torch.where(stays, old[place], fresh)

    entries = functional.masked_gather(one.weight, index).to(one.values.dtype)
    values = carried(one.values.detach(), entries)
    length = len(one)
    one.reindex(index, values)
    if optimizer is None:
        return
    state = optimizer.state.get(one.values, {})
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 1 and tensor.numel() == length:
            fresh: torch.Tensor | float = 0.0
            if name in seeds:
                seed = seeds[name][number].contiguous()
                fresh = functional.masked_gather(seed, index).to(tensor.dtype)
            state[name] = carried(tensor, fresh)


@contextlib.contextmanager
def restored(sets: Iterable[SparseSet]) -> Iterator[None]:
    """Within the context the weights may be perturbed at their trained entries, by
    ``one.write(direction, alpha=epsilon)``; at its end they are what they were, bit for bit.
    """
    kept = [(one, one.entries()) for one in sets]
    try:
        yield
    finally:
        for one, entries in kept:
            one.write(entries)
