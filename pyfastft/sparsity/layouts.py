"""Sets of every layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pyfastft._check import reject
from pyfastft.functional import masked as functional
from pyfastft.ops.masked._rectangles import matrix_of, starts_of
from pyfastft.sparsity.set import SparseSet


def _ascending(op: str, arg: str, numbers: Sequence[int] | torch.Tensor, end: int) -> torch.Tensor:
    """Distinct numbers below ``end``, sorted, int64."""
    given = torch.as_tensor(numbers)
    if given.dim() != 1 or given.is_floating_point() or given.dtype is torch.bool:
        reject(op, arg, "shape (count,) and integers", f"{tuple(given.shape)} of {given.dtype}")
    found = torch.unique(given.long())
    if found.numel() != given.numel():
        reject(op, arg, "distinct numbers", f"{given.numel() - found.numel()} repetitions")
    if found.numel() and (int(found[0]) < 0 or int(found[-1]) >= end):
        reject(op, arg, f"numbers below {end}", f"{int(found[0])} to {int(found[-1])}")
    return found


def elements(weight: torch.Tensor, entries: Sequence[int] | torch.Tensor) -> SparseSet:
    """Single entries: flat offsets in any order, or a bool mask of the weight's shape."""
    if isinstance(entries, torch.Tensor) and entries.dtype is torch.bool:
        if entries.shape != weight.shape:
            reject("elements", "entries", f"shape {tuple(weight.shape)}", tuple(entries.shape))
        return SparseSet(weight, entries.reshape(-1).nonzero()[:, 0])
    return SparseSet(weight, _ascending("elements", "entries", entries, weight.numel()))


def rows(weight: torch.Tensor, numbers: Sequence[int] | torch.Tensor) -> SparseSet:
    """Whole rows of a weight (N, K), by their numbers."""
    n, k = matrix_of(weight)
    index = _ascending("rows", "numbers", numbers, n) * k
    return SparseSet(weight, index, 1, k, layout="rows")


def columns(weight: torch.Tensor, numbers: Sequence[int] | torch.Tensor) -> SparseSet:
    """Whole columns of a weight (N, K), by their numbers."""
    n, k = matrix_of(weight)
    return SparseSet(weight, _ascending("columns", "numbers", numbers, k), n, 1, layout="columns")


def blocks(
    weight: torch.Tensor, numbers: Sequence[int] | torch.Tensor, size: tuple[int, int]
) -> SparseSet:
    """Blocks of ``size`` (rows, columns), numbered along the rows of the grid that they tile."""
    n, k = matrix_of(weight)
    for name, one, total in (("rows", size[0], n), ("columns", size[1], k)):
        if one < 1 or total % one:
            reject("blocks", "size", f"a divisor of {total} {name}", one)
    found = _ascending("blocks", "numbers", numbers, n // size[0] * (k // size[1]))
    return SparseSet(weight, starts_of(found, *size, k), *size, layout="blocks")


def heads(
    weight: torch.Tensor,
    numbers: Sequence[int] | torch.Tensor,
    head_size: int,
    *,
    along: str = "rows",
) -> SparseSet:
    """Heads of a projection: of one that makes them along its rows (queries, keys, values), or of
    the output projection along its columns."""
    n, k = matrix_of(weight)
    if along not in ("rows", "columns"):
        reject("heads", "along", "rows or columns", repr(along))
    total = n if along == "rows" else k
    if head_size < 1 or total % head_size:
        reject("heads", "head_size", f"a divisor of {total}", head_size)
    found = _ascending("heads", "numbers", numbers, total // head_size)
    if along == "rows":
        return SparseSet(weight, found * head_size * k, head_size, k, layout="heads")
    return SparseSet(weight, found * head_size, n, head_size, layout="heads")


def whole(weight: torch.Tensor) -> SparseSet:
    """All of a weight."""
    n, k = matrix_of(weight)
    return SparseSet(weight, torch.zeros(1, dtype=torch.int64), n, k, layout="whole")


def nonzero(weight: torch.Tensor) -> SparseSet:
    """The entries that are not zero: tuning a pruned weight keeps its zeros."""
    return SparseSet(weight, derived_index(weight, "nonzero", {}), layout="nonzero")


def hashed(weight: torch.Tensor, count: int, seed: int) -> SparseSet:
    """``count`` random entries that are a function of the weight's size and the seed alone, so that
    a file of them needs no index: the top ``count`` of a random score (:func:`select_topk`).
    """
    recipe = {"seed": seed, "count": count}
    index = derived_index(weight, "hashed", recipe)
    return SparseSet(weight, index, layout="hashed", recipe=recipe)


def derived_index(weight: torch.Tensor, layout: str, recipe: Mapping[str, int]) -> torch.Tensor:
    """The ascending flat offsets, int64, that a weight and a recipe make: "hashed" of its size,
    "nonzero" of what is not zero in it."""
    weight = weight.detach()
    if layout == "nonzero":
        return weight.reshape(-1).nonzero()[:, 0]
    rng = torch.tensor([recipe["seed"], 0], dtype=torch.int64, device=weight.device)
    return functional.select_topk(weight, recipe["count"], score="random", rng=rng)[0]
