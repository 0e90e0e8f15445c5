"""SparseSet: which entries of a weight train, and their float32 values."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from pyfastft._check import reject
from pyfastft.functional import masked as functional
from pyfastft.ops.masked._rectangles import (
    INDEX_DTYPES,
    check_index,
    expect_rectangles,
    expect_weight,
    matrix_of,
    offsets_of,
    wide,
)


@dataclass(frozen=True)
class Origin:
    """Where a set's entries lay, and what they were, when it began to train."""

    index: torch.Tensor
    entries: torch.Tensor


# Where an optimizer keeps a parameter's set.
ATTRIBUTE = "sparse_set"
# Equal lists of columns are one tensor: layers over one x can then tell that they want the same.
_COLUMNS: weakref.WeakValueDictionary[tuple[torch.device, bytes], torch.Tensor] = (
    weakref.WeakValueDictionary()
)
# Of x a copy is saved where at most this part of its columns train; beyond it x itself, of which
# others may hold the same memory.
_MOST_SAVED = 0.5


class SparseSet:
    """The trained entries of one weight: equal rectangles, and their values.

    The values live in the weight, so every forward is the plain one; ``values`` is their float32
    master (float64 of a float64 weight), a leaf whose ``.grad`` :meth:`linear` fills and which an
    optimizer of :mod:`pyfastft.optim` steps together with the weight. Use the functions of
    :mod:`pyfastft.sparsity` to make one.

    Attributes:
        weight: of shape (N, ...), C-contiguous; a matrix (N, K). It stops requiring a gradient.
        index: ascending flat offsets of the rectangles, int32, or int64 where the weight is larger.
        rows, columns: the size of a rectangle.
        layout: what they are: "element", "rows", "columns", "blocks", "heads", "whole", "hashed"
            or "nonzero".
        recipe: what the index can be made of again, e.g. the seed of a hashed one; may be empty.
        values: of shape (count * rows * columns,), rectangle by rectangle, each row after row.
        saved_columns: the columns that have a trained entry, int64, where few have; else None.
        origin: the entries that :meth:`keep_origin` kept, or None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        index: torch.Tensor,
        rows: int = 1,
        columns: int = 1,
        *,
        layout: str = "element",
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        op = "SparseSet"
        expect_weight(op, "weight", weight, None)
        n, k = matrix_of(weight)
        if index.dtype in INDEX_DTYPES:
            large = weight.numel() > torch.iinfo(torch.int32).max
            index = index.to(weight.device, torch.int64 if large else torch.int32).contiguous()
        expect_rectangles(op, "index", index, rows, columns, n, k)
        check_index(op, index, rows, columns, n, k)
        self.weight = weight.requires_grad_(False)
        self.index, self.rows, self.columns = index, rows, columns
        self.layout, self.recipe = layout, MappingProxyType(dict(recipe or {}))
        self.shape = (n, k)
        entries = functional.masked_gather(weight, index, rows=rows, columns=columns)
        self._own(torch.nn.Parameter(entries.to(wide(weight.dtype))))
        self.saved_columns, self.saved_index = self._columns()
        self.origin: Origin | None = None

    def _own(self, values: torch.nn.Parameter) -> None:
        self.values = values
        setattr(values, ATTRIBUTE, self)
        self._versions: tuple[int, int] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseSet:
        other = object.__new__(type(self))
        memo[id(self)] = other
        for name, value in vars(self).items():
            # These never change, and a mapping proxy cannot be copied.
            never = name in ("recipe", "saved_columns")
            kept = value if never else copy.deepcopy(value, memo)
            setattr(other, name, kept)
        other._own(other.values)
        return other

    def __getstate__(self) -> dict[str, Any]:
        # The parameter holds the set: without it there is no circle. A proxy cannot be pickled.
        return {**vars(self), "values": self.values.detach(), "recipe": dict(self.recipe)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.recipe = MappingProxyType(state["recipe"])
        self._own(torch.nn.Parameter(state["values"]))

    def __repr__(self) -> str:
        n, k = self.shape
        size = "" if self.rows == self.columns == 1 else f" of {self.rows} x {self.columns}"
        return (
            f"SparseSet({self.layout}: {self.index.shape[0]}{size} in {n} x {k}, "
            f"density {self.density:.3g})"
        )

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Trained entries over all."""
        return len(self) / max(self.weight.numel(), 1)

    @property
    def nbytes(self) -> int:
        """What the set keeps beside the weight: index and values, without gradient and state."""
        kept = (self.index, self.values, self.saved_columns)
        total = sum(one.numel() * one.element_size() for one in kept if one is not None)
        if self.saved_index is not self.index:
            total += self.saved_index.numel() * self.saved_index.element_size()
        return total

    def _columns(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The columns with a trained entry and the index among them; None and the index itself
        where most have one."""
        k = self.shape[1]
        if k == 0 or self.columns == k:
            return None, self.index
        first = self.index.long()
        groups = torch.unique(first % k // self.columns)
        if groups.numel() * self.columns > _MOST_SAVED * k:
            return None, self.index
        across = torch.arange(self.columns, device=first.device)
        saved = (groups[:, None] * self.columns + across).reshape(-1)
        saved = _COLUMNS.setdefault((saved.device, saved.cpu().numpy().tobytes()), saved)
        place = torch.searchsorted(groups, first % k // self.columns) * self.columns
        return saved, (first // k * saved.numel() + place).to(self.index.dtype)

    # -- what it is ------------------------------------------------------------------------------

    def offsets(self) -> torch.Tensor:
        """The flat offset of every value, int64."""
        return offsets_of(self.index, self.rows, self.columns, self.shape[1])

    def mask(self) -> torch.Tensor:
        """The trained entries as a bool tensor of the weight's shape."""
        mask = torch.zeros(self.weight.numel(), dtype=torch.bool, device=self.weight.device)
        mask[self.offsets()] = True
        return mask.view(self.weight.shape)

    # -- training --------------------------------------------------------------------------------

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """:func:`pyfastft.functional.masked_linear` of x (..., K) with this weight.

        Raises:
            RuntimeError: the values were stepped without the weight, by an optimizer that is none
                of :mod:`pyfastft.optim`. Not looked at under ``torch.compile``.
        """
        if not torch.compiler.is_compiling():
            self._expect_written()
        n, k = self.shape
        return functional.masked_linear(
            x,
            self.weight.view(n, k),
            self.values,
            self.saved_index,
            rows=self.rows,
            columns=self.columns,
            bias=bias,
            saved_columns=self.saved_columns,
        )

    def _expect_written(self) -> None:
        now = self.values._version, self.weight._version
        if self._versions is not None:
            values, weight = (a != b for a, b in zip(now, self._versions, strict=True))
            if values and not weight:
                raise RuntimeError(
                    "SparseSet: the values were changed and the weight was not: step them with an "
                    "optimizer of pyfastft.optim, e.g. MaskedAdamW, or write() them"
                )
        self._versions = now

    def reindex(self, index: torch.Tensor, values: torch.Tensor) -> None:
        """Train other single elements from now on, these masters; gradients are dropped. The
        weight, and an optimizer's state, are left to the caller."""
        if self.origin is not None:
            fresh = index[~torch.isin(index, self.origin.index)]
            both, order = torch.cat([self.origin.index, fresh]).sort()
            grown = functional.masked_gather(self.weight, fresh)
            self.origin = Origin(both, torch.cat([self.origin.entries, grown])[order])
        # What the index was made of no longer makes it.
        self.index, self.layout, self.recipe = index, "element", MappingProxyType({})
        self.values.data, self.values.grad = values, None
        self.saved_columns, self.saved_index = self._columns()
        self._versions = None

    def follow(self, weight: torch.nn.Parameter) -> None:
        """Belong to another tensor of the same shape, to which the weight was moved or made. The
        masters keep their precision; neither they nor the weight are written."""
        device, dtype = weight.device, wide(weight.dtype)
        values, grad = self.values, self.values.grad
        values.grad = None
        values.data = values.data.to(device, dtype)
        values.grad = None if grad is None else grad.to(device, dtype)
        self.weight, self.index = weight, self.index.to(device)
        self.saved_columns, self.saved_index = self._columns()
        self._versions = None

    # -- the way back ----------------------------------------------------------------------------

    def keep_origin(self) -> None:
        """Keep the entries as they are now, for :meth:`restore`."""
        self.origin = Origin(self.index, self.entries())

    def restore(self) -> None:
        """Make the weight what it was at :meth:`keep_origin`, bit for bit, those entries too that
        were dropped since.

        Raises:
            ValueError: nothing was kept.
        """
        if self.origin is None:
            reject("SparseSet", "origin", "entries kept before training", "None")
        everything = self.changed()
        everything.write(self.origin.entries.to(self.weight.device, self.weight.dtype))
        self.read()

    def changed(self) -> SparseSet:
        """A set of all entries that :meth:`keep_origin` kept, those dropped since among them, with
        the weight's present values; without an origin the set itself."""
        if self.origin is None:
            return self
        index, layout = self.origin.index, self.layout
        found = SparseSet(
            self.weight, index, self.rows, self.columns, layout=layout, recipe=self.recipe
        )
        found.origin = self.origin
        return found

    # -- the weight's entries --------------------------------------------------------------------

    def entries(self) -> torch.Tensor:
        """The weight's own trained entries, bit for bit: what :meth:`write` restores."""
        return functional.masked_gather(
            self.weight, self.index, rows=self.rows, columns=self.columns
        )

    @torch.no_grad()
    def write(self, values: torch.Tensor | None = None, *, alpha: float | None = None) -> None:
        """Put values into the weight: the masters, or others of its dtype or float32.

        Of the weight's dtype they are written bit for bit. The masters are not changed; call
        :meth:`read` where they should follow.

        Args:
            values: of shape (len(self),); absent, the masters.
            alpha: add this multiple of them in place of replacing.
        """
        functional.masked_scatter_(
            self.weight,
            self.values.detach() if values is None else values,
            self.index,
            rows=self.rows,
            columns=self.columns,
            alpha=alpha,
        )

    @torch.no_grad()
    def read(self) -> None:
        """Make the masters what stands in the weight."""
        self.values.copy_(self.entries())
        self._versions = None


def pack(sets: Iterable[SparseSet]) -> torch.Tensor:
    """Move the values of several sets into one flat tensor, the arena, which is returned.

    Each set's ``values`` stays the same parameter and becomes a view of its part.

    Raises:
        ValueError: the sets are of several devices or dtypes, or none.
    """
    sets = list(sets)
    kinds = {(one.values.device, one.values.dtype) for one in sets}
    if len(kinds) != 1:
        reject("pack", "sets", "one device and dtype", sorted(map(str, kinds)))
    arena = torch.cat([one.values.detach() for one in sets])
    for one, part in zip(sets, arena.split([len(one) for one in sets]), strict=True):
        one.values.data = part
    return arena
