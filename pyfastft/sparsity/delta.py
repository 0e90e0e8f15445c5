"""Delta: what training changed in a model's weights; applied, taken back, composed, compared."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pyfastft._check import FLOATS, expect_dtype, name_of, reject
from pyfastft.functional import masked as functional
from pyfastft.ops.masked._rectangles import (
    check_index,
    expect_rectangles,
    expect_weight,
    matrix_of_shape,
    offsets_of,
    wide,
)
from pyfastft.sparsity.layouts import derived_index
from pyfastft.sparsity.model import sets_of
from pyfastft.sparsity.set import SparseSet

KINDS = ("absolute", "difference")
MODES = ("add", "mean", "sign", "last")
# Layouts whose index is made again of the weight.
DERIVED = ("hashed", "nonzero")

Weights = nn.Module | Mapping[str, torch.Tensor]


def sha256_of(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes as a safetensors file has them, in hexadecimal digits."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    memory: Any = flat.view(torch.uint8).numpy()
    return hashlib.sha256(memory).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Change:
    """What a delta holds of one weight.

    Attributes:
        shape, dtype: of the weight, which counts as a matrix (N, K).
        values: of shape (count * rows * columns,), rectangle by rectangle, each row after row.
        index: ascending flat offsets of the rectangles; None where the weight makes it: by its
            size and ``recipe`` ("hashed"), or by which entries are not zero ("nonzero").
        index_sha256: of such an index, as int64.
        rows, columns, layout, recipe: as :class:`SparseSet` has them.
        fingerprint: sha256 of the weight's bytes: of an absolute change with zeros at its entries,
            of a difference as the base has them. None where it is not known.

    Raises:
        ValueError, TypeError: they do not fit each other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor = dataclasses.field(repr=False)
    index: torch.Tensor | None = dataclasses.field(repr=False)
    fingerprint: str | None
    rows: int = 1
    columns: int = 1
    layout: str = "element"
    recipe: Mapping[str, int] = dataclasses.field(default_factory=dict)
    index_sha256: str | None = None

    def __post_init__(self) -> None:
        op, (n, k) = "Change", matrix_of_shape(self.shape)
        expect_dtype(op, "values", self.values, FLOATS)
        count = self.values.numel()
        if self.index is not None:
            count = expect_rectangles(op, "index", self.index, self.rows, self.columns, n, k)
            check_index(op, self.index, self.rows, self.columns, n, k)
        elif self.layout not in DERIVED or self.area != 1 or self.index_sha256 is None:
            reject(op, "index", f"one for layout {self.layout}", "none")
        if tuple(self.values.shape) != (count,) or count > n * k:
            wanted = f"shape ({count},) within {n * k} elements"
            reject(op, "values", wanted, tuple(self.values.shape))

    def offsets(self, index: torch.Tensor) -> torch.Tensor:
        """The flat offset of every value, int64, where the index is this."""
        return offsets_of(index, self.rows, self.columns, matrix_of_shape(self.shape)[1])

    @property
    def area(self) -> int:
        """Entries of one rectangle."""
        return self.rows * self.columns

    def index_on(self, weight: torch.Tensor) -> torch.Tensor:
        """The index, on the weight's device.

        Raises:
            ValueError: the weight makes another index than that of the delta.
        """
        if self.index is not None:
            return self.index.to(weight.device)
        index = derived_index(weight, self.layout, self.recipe)
        count = self.values.numel()
        if index.numel() != count or sha256_of(index) != self.index_sha256:
            what = f"a base whose {self.layout} entries are the {count} that trained"
            reject("Delta", "model", what, f"{index.numel()} others")
        return index


class _Place(NamedTuple):
    """Where a change goes. ``frozen`` is the fingerprint without its entries, where verified."""

    weight: torch.Tensor
    where: torch.Tensor
    frozen: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """What training changed in a model's weights; :func:`pyfastft.save_delta` writes a file of it.

    An ``"absolute"`` delta holds the trained entries themselves: applied to its base it gives the
    trained weights bit for bit. A ``"difference"`` holds what was added to the base's entries, and
    can be composed with others.

    Attributes:
        kind: which of the two.
        changes: a :class:`Change` for each weight, by the parameter's name.
    """

    kind: str
    changes: Mapping[str, Change]

    def __repr__(self) -> str:
        return f"Delta({self.kind}: {self.entries} entries of {len(self.changes)} weights)"

    @property
    def entries(self) -> int:
        """How many entries of all weights it changes."""
        return sum(change.values.numel() for change in self.changes.values())

    @classmethod
    @torch.no_grad()
    def of(cls, source: nn.Module | Mapping[str, SparseSet]) -> Delta:
        """The absolute delta of trained sets: those of a model, or by their parameters' names.

        What stands in the weights counts, not the masters beside them. The base is not needed: what
        identifies it is what did not train, which is in the weights still. Entries that a set
        dropped on its way count as trained where it keeps its origin (``SparseSet.keep_origin``, as
        :func:`pyfastft.convert` does); without it they count as the base's.

        Raises:
            ValueError: nothing of the model trains in part.
        """
        sets = sets_of(_unwrapped(source)) if isinstance(source, nn.Module) else source
        if not sets:
            reject("Delta", "source", "at least one set", "none")
        changes = {}
        for name, trained in sets.items():
            one = trained.changed()
            frozen = _frozen(one.weight, one.index, one.rows, one.columns)
            # Of zeros alone the base's entries that are not zero are the trained ones.
            exact = one.layout != "nonzero" or not bool(frozen.any())
            changes[name] = Change(
                shape=tuple(one.weight.shape),
                dtype=one.weight.dtype,
                values=one.entries(),
                index=one.index,
                fingerprint=sha256_of(frozen),
                rows=one.rows,
                columns=one.columns,
                layout=one.layout if exact else "element",
                recipe=one.recipe,
            )
        return cls("absolute", changes)

    def fits(self, model: Weights) -> bool:
        """Whether :meth:`apply` would take the model; it says what does not fit."""
        try:
            self._places("fits", model, verify=True)
        except (TypeError, ValueError):
            return False
        return True

    @torch.no_grad()
    def apply(self, model: Weights, *, verify: bool = True) -> Delta:
        r"""Change a model's weights in place, and return the delta that takes it back bit for bit.

        .. math:: W|_{\mathrm{index}} \leftarrow \mathrm{values} \quad \text{or} \quad
            W|_{\mathrm{index}} \leftarrow W|_{\mathrm{index}} + \mathrm{values}

        of an absolute delta and of a difference, which is added in float32 and rounded once.
        Everything is checked before a weight is touched. The masters of sets in a module follow.

        Args:
            model: the base, a module or its parameters by name; C-contiguous weights, on any
                device.
            verify: hold the base to its fingerprints, which reads all of each weight; the slow part
                by far. Without it a difference may be added to weights of another dtype too.

        Returns:
            The absolute delta of what stood there. Its values stay on the weights' devices.

        Raises:
            ValueError: a parameter is missing, its shape is another, or it is not the base.
            TypeError: a weight's dtype is another.
        """
        places = self._places("apply", model, verify=verify)
        reverting = {}
        for name, (weight, index, frozen) in places.items():
            change = self.changes[name]
            rectangles = {"rows": change.rows, "columns": change.columns}
            alpha, values = None, change.values.to(weight.device)
            if self.kind == "difference":
                alpha, values = 1.0, values.to(wide(weight.dtype))
            reverting[name] = dataclasses.replace(
                change,
                dtype=weight.dtype,
                values=functional.masked_gather(weight, index, **rectangles),
                index=index,
                fingerprint=frozen,
                # An entry that trained to zero is no longer one that is not.
                layout="element" if change.layout == "nonzero" else change.layout,
            )
            functional.masked_scatter_(weight, values, index, alpha=alpha, **rectangles)
        if isinstance(model, nn.Module):
            touched = {place.weight.data_ptr() for place in places.values()}
            for one in sets_of(model).values():
                if one.weight.data_ptr() in touched:
                    one.read()
        return Delta("absolute", reverting)

    @torch.no_grad()
    def difference(self, base: Weights) -> Delta:
        """An absolute delta as a difference to its base, in float32 (float64 of float64 weights).

        Of half precision that is mostly exact, so that applying it gives the same weights; of
        float32 the sum may round in the last place.

        Args:
            base: as :meth:`apply` takes it; it is not changed.

        Raises:
            ValueError, TypeError: as :meth:`apply`; or the delta is a difference.
        """
        if self.kind != "absolute":
            reject("difference", "delta", "kind absolute", self.kind)
        changes = {}
        for name, (weight, index, _) in self._places("difference", base, verify=True).items():
            change, dtype = self.changes[name], wide(weight.dtype)
            old = functional.masked_gather(weight, index, rows=change.rows, columns=change.columns)
            values = change.values.to(weight.device, dtype) - old.to(dtype)
            changes[name] = dataclasses.replace(
                change, values=values, index=index, fingerprint=sha256_of(weight)
            )
        return Delta("difference", changes)

    def _places(self, op: str, model: Weights, *, verify: bool) -> dict[str, _Place]:
        """The weights and the indices on them, all checked; with fingerprints if ``verify``."""
        if isinstance(model, nn.Module):
            model = dict(_unwrapped(model).named_parameters(remove_duplicate=False))
        places, names = {}, dict[int, str]()
        for name, change in self.changes.items():
            if name not in model:
                reject(op, "model", f"a parameter {name}", "none")
            weight = model[name].detach()
            expect_weight(op, name, weight, None)
            if tuple(weight.shape) != change.shape:
                reject(op, name, f"shape {change.shape}", tuple(weight.shape))
            if weight.dtype != change.dtype and (verify or self.kind == "absolute"):
                what = f"dtype {name_of(change.dtype)}"
                reject(op, name, what, name_of(weight.dtype), error=TypeError)
            other = names.setdefault(weight.data_ptr(), name)
            if other != name and weight.numel():
                reject(op, name, "memory of its own", f"that of {other}")
            try:
                index = change.index_on(weight)
            except ValueError as error:
                raise ValueError(f"{op}: {name}: {error}") from None
            frozen = None
            if verify:
                frozen = sha256_of(_frozen(weight, index, change.rows, change.columns))
                found = frozen if self.kind == "absolute" else sha256_of(weight)
                if found != (change.fingerprint or found):
                    reject(op, name, f"sha256 {change.fingerprint} of the base", found)
            places[name] = _Place(weight, index, frozen)
        return places


def _unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile wrapped: the wrapper's parameters have longer names."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _frozen(weight: torch.Tensor, index: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A copy of the weight with zeros at its trained entries."""
    copy = weight.detach().clone()
    zeros = copy.new_zeros(index.numel() * rows * columns)
    return functional.masked_scatter_(copy, zeros, index, rows=rows, columns=columns)


# -- several deltas --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How many of the entries that either of two deltas changes both change (Jaccard's index).

    Attributes:
        whole: of all weights together.
        weights: of each by itself; 0 of one that a single delta changes.
    """

    whole: float
    weights: Mapping[str, float]


def overlap(a: Delta, b: Delta, *, base: Weights | None = None) -> Overlap:
    r"""Which part of the entries of two deltas is common to both.

    .. math:: J = |S_a \cap S_b| / |S_a \cup S_b|

    Args:
        a, b: deltas of one model.
        base: what both are of, where an index is made of the weights; its fingerprints are not
            read.

    Raises:
        ValueError, TypeError: a weight's shape differs, or a base is needed and does not fit.

    Reference:
        Panigrahi et al. 2023, "Task-Specific Skill Localization in Fine-tuned Language Models",
        section 5.
    """
    sides = [
        {
            name: change.offsets(index)
            for name, (change, index) in _indexed("overlap", one, base, verify=False).items()
        }
        for one in (a, b)
    ]
    for name in a.changes.keys() & b.changes.keys():
        _expect_same("overlap", name, a.changes[name], b.changes[name], ("shape",))
    none = torch.empty(0, dtype=torch.int64)
    weights, common, total = dict[str, float](), 0, 0
    for name in {**a.changes, **b.changes}:
        first, second = (side.get(name, none) for side in sides)
        both = int(torch.isin(first, second, assume_unique=True).sum())
        either = first.numel() + second.numel() - both
        weights[name] = both / either if either else 1.0
        common, total = common + both, total + either
    return Overlap(common / total if total else 1.0, weights)


@torch.no_grad()
def compose(
    deltas: Sequence[Delta],
    mode: str = "add",
    *,
    factors: Sequence[float] | None = None,
    base: Weights | None = None,
) -> Delta:
    r"""One delta of several that were trained from one base.

    With :math:`d_i` the differences to the base, zero where a delta has no entry, and
    :math:`f_i` the factors:

    .. math::
        \text{add: } \sum_i f_i d_i, \quad
        \text{mean: } \frac{\sum_i f_i d_i}{\sum_i f_i}, \quad
        \text{sign: } \frac{\sum_{i \in A} f_i d_i}{\sum_{i \in A} f_i}, \;
        A = \{i : \operatorname{sgn} d_i = \operatorname{sgn} \textstyle\sum_j f_j d_j \neq 0\}

    and "last" takes an entry's value from the last delta that has it.

    Args:
        deltas: of weights of one model, not necessarily the same ones.
        mode: "add", "mean", "sign" or "last".
        factors: one for each delta, ones where absent; for "mean" and "sign" above zero. None with
            "last".
        base: needed where a delta is absolute, or an index is made of the weights. It is read, and
            held to the deltas' fingerprints.

    Returns:
        A difference of the union of the entries, on the CPU; an absolute delta for "last" of none
        but absolute ones, whose values stay bit for bit.

    Raises:
        ValueError: the deltas are of different bases, or an argument does not fit.
        TypeError: weights' dtypes differ.

    Reference:
        Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", section 3.3
        (add); Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models",
        section 4 (sign).
    """
    op, several = "compose", list(deltas)
    if not several:
        reject(op, "deltas", "at least one", "none")
    if mode not in MODES:
        reject(op, "mode", f"{', '.join(MODES)}", repr(mode))
    if factors is not None and (mode == "last" or len(factors) != len(several)):
        reject(op, "factors", f"{len(several)} numbers beside a sum", factors)
    scales = [1.0] * len(several) if factors is None else [float(one) for one in factors]
    least = 0.0 if mode in ("mean", "sign") else -math.inf
    if not all(least < one < math.inf for one in scales):
        reject(op, "factors", f"numbers above {least:g}", scales)
    kinds = {one.kind for one in several}
    absolute = kinds == {"absolute"} and mode == "last"
    if "absolute" in kinds and base is None:
        reject(op, "base", "the model that absolute deltas were trained from", None)
    if not absolute:
        several = [
            one.difference(base) if one.kind == "absolute" and base is not None else one
            for one in several
        ]
    indexed = [_indexed(op, one, base, verify=True) for one in several]
    same = ("shape", "dtype") if absolute else ("shape", "dtype", "fingerprint")
    changes = {}
    for name in {name: None for one in several for name in one.changes}:
        own = [
            (scale, *one[name]) for scale, one in zip(scales, indexed, strict=True) if name in one
        ]
        for _, change, _ in own:
            _expect_same(op, name, own[0][1], change, same)
        changes[name] = _composed(own, mode, sum(scales), absolute=absolute)
    if not absolute or base is None:
        return Delta("difference", changes)
    places = Delta("absolute", changes)._places(op, base, verify=True)
    return Delta(
        "absolute",
        {
            name: dataclasses.replace(change, fingerprint=places[name].frozen)
            for name, change in changes.items()
        },
    )


def _indexed(
    op: str, delta: Delta, base: Weights | None, *, verify: bool
) -> dict[str, tuple[Change, torch.Tensor]]:
    """The changes and their indices, on the CPU; checked on the base, where there is one."""
    if base is None:
        found = {}
        for name, change in delta.changes.items():
            if change.index is None:
                what = f"a model, the index of {name} is made of its weight"
                reject(op, "base", what, None)
            found[name] = change, change.index.to("cpu")
        return found
    places = delta._places(op, base, verify=verify)
    return {name: (delta.changes[name], place.where.to("cpu")) for name, place in places.items()}


def _expect_same(op: str, name: str, a: Change, b: Change, fields: Sequence[str]) -> None:
    for field in fields:
        mine, other = getattr(a, field), getattr(b, field)
        if mine != other:
            reject(op, f"deltas of {name}", f"{field} {mine}", other, because="in all of them")


def _composed(
    own: Sequence[tuple[float, Change, torch.Tensor]], mode: str, total: float, *, absolute: bool
) -> Change:
    """The change that several of one weight make, each beside its factor and its index."""
    first, index_dtype = own[0][1], own[0][2].dtype
    rows, columns = first.rows, first.columns
    alike = all((change.rows, change.columns) == (rows, columns) for _, change, _ in own)
    if not alike:
        rows = columns = 1
    dtype = first.dtype if absolute else wide(first.dtype)
    parts = []
    for factor, change, index in own:
        values = change.values.to("cpu", dtype)
        if not alike:
            index, order = change.offsets(index).sort()
            values = values[order]
        parts.append((factor, index.long(), values.view(-1, rows * columns)))
    union = torch.unique(torch.cat([index for _, index, _ in parts]))
    placed = [(factor, torch.searchsorted(union, index), values) for factor, index, values in parts]
    merge = {"add": _sum, "mean": _sum, "sign": _elected, "last": _last}[mode]
    values = merge(placed, torch.zeros(len(union), rows * columns, dtype=dtype))
    return dataclasses.replace(
        first,
        values=(values / total if mode == "mean" else values).view(-1),
        index=union.to(index_dtype),
        fingerprint=None if absolute else first.fingerprint,
        rows=rows,
        columns=columns,
        layout=first.layout if alike and first.layout not in DERIVED else "element",
        recipe={},
        index_sha256=None,
    )


# Factor, rows in the union, and values (count, area) of each delta.
_Placed = Sequence[tuple[float, torch.Tensor, torch.Tensor]]


def _sum(placed: _Placed, out: torch.Tensor) -> torch.Tensor:
    for factor, place, values in placed:
        out[place] += factor * values
    return out


def _last(placed: _Placed, out: torch.Tensor) -> torch.Tensor:
    for _, place, values in placed:
        out[place] = values
    return out


def _elected(placed: _Placed, out: torch.Tensor) -> torch.Tensor:
    """The mean of those whose sign is that of the sum."""
    sign = _sum(placed, out.clone()).sign()
    weight = torch.zeros_like(out)
    for factor, place, values in placed:
        agrees = values.sign() == sign[place]
        out[place] += torch.where(agrees, factor * values, 0)
        weight[place] += factor * agrees
    return torch.where(weight > 0, out / weight, 0)
