"""Deltas: applied and taken back bit for bit, held to their base, composed, compared."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import pyfastft as ft
from pyfastft import sparsity
from pyfastft.testing.tolerance import assert_accurate, assert_exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "element": lambda w: sparsity.select([w], 0.1, score="random")[0],
    "rows": lambda w: sparsity.rows(w, [0, 5]),
    "columns": lambda w: sparsity.columns(w, [3, 4, 9]),
    "blocks": lambda w: sparsity.blocks(w, [1, 4, 5], (2, 4)),
    "heads": lambda w: sparsity.heads(w, [1], 4, along="columns"),
    "whole": sparsity.whole,
    "hashed": lambda w: sparsity.hashed(w, 17, seed=5),
    "nonzero": sparsity.nonzero,
    "none": lambda w: sparsity.elements(w, torch.empty(0, dtype=torch.int64)),
}


def trained(base: torch.Tensor, layout: str = "element") -> sparsity.SparseSet:
    """A set on a copy of the base whose entries have other values."""
    one = LAYOUTS[layout](base.clone())
    one.write(torch.randn(len(one)))
    return one


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_and_revert_are_exact(dtype: torch.dtype, layout: str, tmp_path: Path) -> None:
    base = torch.randn(8, 12).to(dtype)
    # What no arithmetic gives back: a NaN with bits of its own, infinity, a zero with a sign.
    base[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0]).to(dtype)
    base[2:6] = 0
    one = trained(base, layout)
    entry = nn.ParameterDict({"layer": base.clone()})
    ft.save_delta({"layer": one}, tmp_path / "task")
    delta = ft.load_delta(tmp_path / "task")
    assert delta.entries == len(one)
    assert delta.fits(entry)
    back = delta.apply(entry)
    assert torch.equal(bits(entry["layer"]), bits(one.weight))
    assert back.fits(entry)
    again = back.apply(entry)
    assert torch.equal(bits(entry["layer"]), bits(base))
    again.apply(entry, verify=False)
    assert torch.equal(bits(entry["layer"]), bits(one.weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_difference_is_added(dtype: torch.dtype) -> None:
    base = {"a": torch.randn(8, 12).to(dtype)}
    start = base["a"].clone()
    one = trained(start)
    delta = ft.Delta.of({"a": one}).difference(base)
    assert_exact(base["a"], start)
    added = one.entries().float() - start.view(-1)[one.offsets()].float()
    assert_exact(delta.changes["a"].values, added)
    back = delta.apply(base)
    truth = start.double().view(-1).index_add(0, one.offsets(), added.double()).view(8, 12)
    assert_accurate(base["a"], truth, truth.to(dtype))
    assert not delta.fits(base)
    back.apply(base)
    assert_exact(base["a"], start)
    with pytest.raises(ValueError, match="kind absolute"):
        delta.difference(base)


def test_only_its_base_takes_a_delta() -> None:
    base = {name: torch.randn(6, 4) for name in "ab"}
    delta = ft.Delta.of({name: trained(weight) for name, weight in base.items()})
    index = delta.changes["b"].index
    assert index is not None
    frozen = next(i for i in range(24) if i not in index.tolist())
    other = {name: weight.clone() for name, weight in base.items()}
    other["b"].view(-1)[frozen] += 1
    before = {name: weight.clone() for name, weight in other.items()}
    with pytest.raises(ValueError, match=r"apply: expected b of sha256 \w+ of the base, got"):
        delta.apply(other)
    for name in "ab":
        assert_exact(other[name], before[name])
    assert not delta.fits(other)
    back = delta.apply(other, verify=False)
    assert_exact(other["b"].view(-1)[index.long()], delta.changes["b"].values)
    back.apply(other)
    assert_exact(other["b"], before["b"])
    # What a delta sets may be anything before, but a difference is to the base alone.
    other["b"].copy_(base["b"])
    other["b"].view(-1)[int(index[0])] += 1
    assert delta.fits(other)
    assert not delta.difference(base).fits(other)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda m: m.pop("b"), ValueError, "expected model of a parameter b"),
        (lambda m: m.update(b=m["b"].T.contiguous()), ValueError, r"expected b of shape \(6, 4\)"),
        (lambda m: m.update(b=m["b"].double()), TypeError, "expected b of dtype float32"),
        (lambda m: m.update(b=torch.randn(4, 6).T), ValueError, "C-contiguous"),
        (lambda m: m.update(b=m["a"]), ValueError, "memory of its own"),
    ],
)
def test_what_takes_no_delta(change, error: type[Exception], says: str) -> None:
    model = {name: torch.randn(6, 4) for name in "ab"}
    delta = ft.Delta.of({name: trained(weight) for name, weight in model.items()})
    change(model)
    before = model["a"].clone()
    for verify in (True, False):
        with pytest.raises(error, match=says):
            delta.apply(model, verify=verify)
    assert not delta.fits(model)
    assert_exact(model["a"], before)


def test_unverified_a_difference_goes_to_another_dtype() -> None:
    base = {"a": torch.randn(6, 4)}
    delta = ft.Delta.of({"a": trained(base["a"])}).difference(base)
    half = {"a": base["a"].bfloat16()}
    with pytest.raises(TypeError, match="dtype float32"):
        delta.apply(half)
    before = half["a"].clone()
    back = delta.apply(half, verify=False)
    assert not torch.equal(half["a"], before)
    back.apply(half)
    assert_exact(half["a"], before)


def test_a_model_and_its_masters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    one = sparsity.rows(model[1].weight, [0, 2])
    with pytest.raises(ValueError, match="at least one set"):
        ft.save_delta(model, tmp_path / "task")
    model[1].register_parameter("values", one.values)
    one.write(torch.randn(8))
    one.read()
    ft.save_delta(model, tmp_path / "task")
    delta = ft.load_delta(tmp_path / "task")
    assert list(delta.changes) == ["1.weight"]
    tuned = one.values.detach().clone()
    # Under torch.compile names are longer.
    wrapper = nn.Module()
    wrapper._orig_mod = model
    back = delta.apply(base)
    back.apply(wrapper)
    assert_exact(one.values.detach(), base_rows := back.changes["1.weight"].values)
    assert_exact(one.entries(), base_rows)
    delta.apply(model)
    assert_exact(one.values.detach(), tuned)


def test_what_a_set_dropped_on_its_way_is_in_the_delta(tmp_path: Path) -> None:
    """SaRA chooses again midway: what it trained before stays in the weights."""
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 3))
    base = copy.deepcopy(model)
    ft.convert(model, ft.MaskedTuning(method="sara", density=0.2))
    sets = sparsity.sets_of(model)
    optimizer = ft.optim.MaskedAdamW(list(sets.values()), lr=0.1)
    tuner = sparsity.SaRA(model, optimizer, steps=4, rank_weight=0)
    before = sum(map(len, sets.values()))
    for _ in range(4):
        model(torch.randn(5, 12)).square().mean().backward()
        optimizer.step()
        tuner.step()
    assert sum(map(len, sets.values())) < before
    ft.save_delta(model, tmp_path / "task")
    delta = ft.load_delta(tmp_path / "task")
    assert delta.entries == before
    back = delta.apply(base)
    for name, weight in base.named_parameters():
        assert_exact(weight.detach(), model.state_dict()[name])
    back.apply(model)
    ft.revert(model)
    back.apply(base)
    for ours, theirs in zip(model.parameters(), base.parameters(), strict=True):
        assert_exact(ours.detach(), theirs.detach())


def test_an_index_made_of_the_weight_is_that_of_the_delta(tmp_path: Path) -> None:
    base = torch.randn(8, 12)
    base[2:6] = 0
    deltas = {}
    for layout in ("hashed", "nonzero"):
        ft.save_delta({"a": trained(base, layout)}, tmp_path / layout)
        deltas[layout] = ft.load_delta(tmp_path / layout)
        assert deltas[layout].changes["a"].index is None
        with pytest.raises(ValueError, match="the index of a is made of its weight"):
            ft.overlap(deltas[layout], deltas[layout])
        assert ft.overlap(deltas[layout], deltas[layout], base={"a": base}).whole == 1
    other = base.clone()
    other[7, 7] = 0
    with pytest.raises(ValueError, match="a: Delta: expected model of a base whose nonzero"):
        deltas["nonzero"].apply({"a": other}, verify=False)
    zeroed = trained(base, "nonzero")
    zeroed.write(torch.zeros(len(zeroed)))
    tuned = {"a": base.clone()}
    ft.save_delta(ft.Delta.of({"a": zeroed}).apply(tuned), tmp_path / "back")
    ft.load_delta(tmp_path / "back").apply(tuned)
    assert_exact(tuned["a"], base)
    one = deltas["nonzero"].changes["a"]
    fewer = ft.Delta("absolute", {"a": dataclasses.replace(one, values=one.values[1:])})
    with pytest.raises(ValueError, match="a base whose nonzero"):
        fewer.apply({"a": base})


def test_a_set_that_regrew_keeps_its_index(tmp_path: Path) -> None:
    for layout in ("hashed", "nonzero"):
        base = torch.randn(8, 12)
        base[2:6] = 0
        one = trained(base, layout)
        one.read()
        sparsity.regrow([one], [torch.randn(8, 12)], 5, base=[base], dropped_to="base")
        assert one.layout == "element"
        one.write(torch.randn(len(one)))
        ft.save_delta({"a": one}, tmp_path / "task")
        ft.load_delta(tmp_path / "task").apply({"a": base})
        assert_exact(base, one.weight)
    # Somebody else gave what did not train values.
    base = torch.zeros(4, 6)
    base[0] = 1
    one = trained(base, "nonzero")
    one.weight[1] = base[1] = 2
    ft.save_delta({"a": one}, tmp_path / "task")
    ft.load_delta(tmp_path / "task").apply({"a": base})
    assert_exact(base, one.weight)


# -- several ---------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")
# By delta: the layouts it has on each weight; on "b" they differ, "c" is missing in one.
SEVERAL = (
    {"a": "element", "b": "rows", "c": "blocks"},
    {"a": "element", "b": "columns"},
    {"a": "hashed", "b": "element", "c": "blocks"},
)


def several() -> tuple[dict[str, torch.Tensor], list[dict[str, sparsity.SparseSet]]]:
    base = {name: torch.randn(8, 12) for name in NAMES}
    sets = [{n: trained(base[n], layout) for n, layout in own.items()} for own in SEVERAL]
    return base, sets


def dense(base: torch.Tensor, own: list[dict[str, sparsity.SparseSet]], name: str) -> torch.Tensor:
    """The differences, one matrix for each delta."""
    zero = torch.zeros_like(base, dtype=torch.float64)
    return torch.stack([
        one[name].weight.double() - base.double() if name in one else zero for one in own
    ])  # fmt: skip


def expected(d: torch.Tensor, mode: str, f: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    f = f.double()[:, None, None]
    if mode == "add":
        return (f * d).sum(0)
    if mode == "mean":
        return (f * d).sum(0) / f.sum()
    if mode == "sign":
        agrees = (d.sign() == (f * d).sum(0).sign()) & (d != 0)
        return ((f * d * agrees).sum(0) / (f * agrees).sum(0)).nan_to_num()
    out = torch.zeros_like(d[0])
    for difference, mask in zip(d, held, strict=True):
        out = torch.where(mask, difference, out)
    return out


@pytest.mark.parametrize("mode", ["add", "mean", "sign", "last"])
@pytest.mark.parametrize("kind", ["absolute", "difference", "both"])
def test_composition_is_its_equation(mode: str, kind: str) -> None:
    base, sets = several()
    deltas = [ft.Delta.of(own) for own in sets]
    for i in {"absolute": (), "difference": (0, 1, 2), "both": (1,)}[kind]:
        deltas[i] = deltas[i].difference(base)
    factors = None if mode == "last" else [0.5, 2.0, 1.25]
    joined = ft.compose(deltas, mode, factors=factors, base=base)
    assert joined.kind == ("absolute" if (mode, kind) == ("last", "absolute") else "difference")
    assert list(joined.changes) == list(NAMES)
    assert joined.changes["c"].rows == 2
    start = {name: weight.clone() for name, weight in base.items()}
    back = joined.apply(base)
    none = torch.zeros(8, 12, dtype=torch.bool)
    f = torch.ones(3) if factors is None else torch.tensor(factors)
    for name in NAMES:
        held = torch.stack([own[name].mask() if name in own else none for own in sets])
        d = dense(start[name], sets, name)
        truth = start[name].double() + expected(d, mode, f, held)
        naive = start[name] + expected(d, mode, f, held).float()
        assert_accurate(base[name], truth, naive, gradient=True, what=name)
        assert_exact(base[name][~held.any(0)], start[name][~held.any(0)])
        if joined.kind == "absolute":
            for own, mask in zip(sets[::-1], held.flip(0), strict=True):
                if name in own:
                    assert_exact(base[name][mask], own[name].weight[mask])
                    break
    back.apply(base)
    for name in NAMES:
        assert_exact(base[name], start[name])


def test_addition_commutes() -> None:
    base, sets = several()
    deltas = [ft.Delta.of(own).difference(base) for own in sets[:2]]
    there, again = ft.compose(deltas), ft.compose(deltas[::-1])
    for name in NAMES:
        for field in ("index", "values"):
            assert_exact(getattr(there.changes[name], field), getattr(again.changes[name], field))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: {"deltas": []}, "deltas of at least one"),
        (lambda d: {"mode": "max"}, "mode of add, mean, sign, last"),
        (lambda d: {"factors": [1.0]}, "factors of 2 numbers"),
        (lambda d: {"factors": [1.0, 1.0], "mode": "last"}, "factors of 2 numbers"),
        (lambda d: {"factors": [1.0, -1.0], "mode": "mean"}, "numbers above 0"),
        (lambda d: {"factors": [1.0, float("nan")]}, "numbers above -inf"),
        (lambda d: {"deltas": [d[0], ft.Delta.of({"a": trained(torch.randn(8, 12))})]}, "base of"),
    ],
)
def test_what_cannot_be_composed(change, says: str) -> None:
    base = {"a": torch.randn(8, 12)}
    deltas = [ft.Delta.of({"a": trained(base["a"])}).difference(base) for _ in range(2)]
    given = {"deltas": deltas, **change(deltas)}
    with pytest.raises(ValueError, match=says):
        ft.compose(given.pop("deltas"), **given)


def test_deltas_of_different_bases_are_not_composed() -> None:
    bases = [{"a": torch.randn(8, 12)} for _ in range(2)]
    first, second = (ft.Delta.of({"a": trained(base["a"])}).difference(base) for base in bases)
    with pytest.raises(ValueError, match="deltas of a of fingerprint"):
        ft.compose([first, second])
    for base in bases:
        with pytest.raises(ValueError, match="sha256"):
            ft.compose([first, second], base=base)


def test_overlap_counts_entries() -> None:
    _, sets = several()
    first, second = ft.Delta.of(sets[0]), ft.Delta.of(sets[2])
    found = ft.overlap(first, second)
    common = total = 0
    for name in NAMES:
        a, b = (set(one[name].offsets().tolist()) for one in (sets[0], sets[2]))
        assert found.weights[name] == len(a & b) / len(a | b)
        common, total = common + len(a & b), total + len(a | b)
    assert common
    assert found.whole == common / total
    assert ft.overlap(first, ft.Delta.of(sets[1])).weights["c"] == 0
    nothing = ft.Delta.of({"a": trained(torch.randn(8, 12), "none")})
    assert ft.overlap(nothing, nothing).whole == 1
    with pytest.raises(ValueError, match="deltas of a of shape"):
        ft.overlap(first, ft.Delta.of({"a": trained(torch.randn(12, 8))}))
