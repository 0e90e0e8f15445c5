"""The masked family beyond what the registry's tests hold every op to."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch

import pyfastft as ft
from pyfastft import sparsity
from pyfastft.functional import masked as F
from pyfastft.ops import masked as ops
from pyfastft.ops.masked._rectangles import offsets_of
from pyfastft.reference.masked.step import round_stochastic
from pyfastft.testing.tolerance import assert_accurate, assert_exact

BACKENDS = ("cpu", "reference")


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest):
    with ft.backend(request.param):
        yield request.param


BAD_INDEX = {
    "descending": ([3, 1], "ascend"),
    "repeated": ([3, 3], "ascend"),
    "negative": ([-1, 3], "within"),
    "beyond": ([3, 24], "within"),
    "off-grid": ([0, 3], "grid"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_a_hostile_index_is_refused_before_anything_is_written(on: str, name: str) -> None:
    offsets, says = BAD_INDEX[name]
    rows, columns = (2, 2) if name == "off-grid" else (1, 1)
    index = torch.tensor(offsets)
    weight = torch.randn(4, 6)
    before = weight.clone()
    count = len(offsets) * rows * columns
    hypers = torch.tensor([[0.1, 0, 1, 1, 0.9, 0.99, 1e-8]], dtype=torch.float64)
    states = [[torch.ones(count)] for _ in range(5)]
    calls: list[Callable[[], object]] = [
        lambda: F.masked_gather(weight, index, rows=rows, columns=columns),
        lambda: F.masked_scatter_(weight, torch.ones(count), index, rows=rows, columns=columns),
        lambda: F.masked_weight_grad(
            torch.ones(3, 4), torch.ones(3, 6), index, rows=rows, columns=columns
        ),
        lambda: ops.masked_adamw_([weight], *states[:4], [index], [rows], [columns], hypers, None),
        lambda: ops.masked_lion_([weight], *states[:3], [index], [rows], [columns], hypers, None),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"expected index of ascending.*|.*{says}"):
            call()
    assert_exact(weight, before)
    assert all(bool((one[0] == 1).all()) for one in states)


def test_values_without_a_dimension_are_refused(on: str) -> None:
    weight, index = torch.randn(4, 6), torch.tensor([3])
    hypers = torch.tensor([[0.1, 0, 1, 1, 0.9, 0.99, 1e-8]], dtype=torch.float64)
    lists = [[torch.tensor(1.0)] for _ in range(4)]
    with pytest.raises(ValueError, match=r"values\[0\] of shape"):
        ops.masked_adamw_([weight], *lists, [index], [1], [1], hypers, None)


@pytest.mark.parametrize(
    ("kept", "grown"), [([1, 0], []), ([3], []), ([-1], []), ([0], [2]), ([], [5, 4])]
)
def test_lists_that_cannot_be_merged(on: str, kept: list[int], grown: list[int]) -> None:
    lists = torch.tensor([2, 5, 9]), torch.tensor(kept).long(), torch.tensor(grown).long()
    with pytest.raises(ValueError, match=r"masked_merge: expected (kept|grown)"):
        F.masked_merge(*lists)


@pytest.mark.parametrize("offsets", [[7], [1, 1], [2, 1], [-1]])
def test_what_cannot_be_excluded(on: str, offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="select_topk: expected exclude"):
        F.select_topk(torch.rand(4), 1, exclude=[torch.tensor(offsets)])


def test_selection_is_exact_where_every_bracket_misses(on: str) -> None:
    """The sample reads runs of 16 at regular distances: what it reads is unlike the rest."""
    size = 1 << 19
    tensor = torch.rand(size)
    tensor.view(-1, 64)[:, :16] += 10
    for k, largest in ((5, True), (size // 2, True), (9, False), (size - 3, True)):
        found = F.select_topk(tensor, k, largest=largest)[0]
        expected = torch.sort(tensor, descending=largest, stable=True).indices[:k].sort().values
        assert_exact(found, expected)


def test_selection_among_equals_takes_the_first(on: str) -> None:
    tensors = [torch.zeros(300_000), torch.ones(10), torch.zeros(400_000)]
    found = F.select_topk(tensors, 300_015)
    assert [len(one) for one in found] == [300_000, 10, 5]
    assert found[2].tolist() == [0, 1, 2, 3, 4]


def test_selection_agrees_with_topk_where_no_two_are_equal(on: str) -> None:
    tensor = torch.randperm(600_000).float() - 300_000.5
    for score, own in (("magnitude", tensor.abs()), ("value", tensor)):
        found = F.select_topk(tensor, 6000, score=score)[0]
        if score == "value":
            assert_exact(found, own.topk(6000).indices.sort().values)
        else:
            assert_exact(own[found].sort().values, own.topk(6000).values.sort().values)


def test_stochastic_rounding_is_right_on_average_and_between_neighbours() -> None:
    torch.manual_seed(1)
    random = torch.randint(0, 65536, (200_000,))
    for dtype, value in ((torch.bfloat16, 1.001), (torch.float16, 1.0003), (torch.float16, 3.3e-7)):
        values = torch.full((200_000,), -value)
        rounded = round_stochastic(values, dtype, random).double()
        assert rounded.unique().numel() == 2
        step = float(rounded.unique().diff())
        # Mean plus seven deviations of it.
        assert abs(float(rounded.mean()) + value) < 7 * step / 2 / 200_000**0.5 + step * 2**-13


def rectangles() -> dict[str, Callable[[torch.Tensor], sparsity.SparseSet]]:
    return {
        "elements": lambda w: sparsity.elements(w, torch.randperm(w.numel())[:40]),
        "few-columns": lambda w: sparsity.elements(w, torch.arange(3, w.numel(), w.shape[1])),
        "rows": lambda w: sparsity.rows(w, [1, 4, 5]),
        "columns": lambda w: sparsity.columns(w, [0, 7, 2]),
        "blocks": lambda w: sparsity.blocks(w, [0, 2, 9], (4, 3)),
        "heads-of-columns": lambda w: sparsity.heads(w, [1], 6, along="columns"),
        "heads-of-rows": lambda w: sparsity.heads(w, [2], 4),
        "whole": sparsity.whole,
    }


@pytest.mark.parametrize("layout", rectangles())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masked_linear_is_the_plain_layer_with_its_gradient_cut_out(
    layout: str, dtype: torch.dtype
) -> None:
    weight = torch.randn(12, 18).to(dtype)
    one = rectangles()[layout](weight.clone())
    x = torch.randn(2, 5, 18).to(dtype).requires_grad_()
    bias = torch.randn(12).to(dtype).requires_grad_()
    y = one.linear(x, bias)
    grad = torch.randn_like(y)
    dx, dbias, dvalues = torch.autograd.grad(y, (x, bias, one.values), grad)

    def plain(kind: torch.dtype) -> tuple[torch.Tensor, ...]:
        operands = [t.detach().to(kind).requires_grad_() for t in (x, bias, weight)]
        out = torch.nn.functional.linear(operands[0], operands[2], operands[1])
        return out, *torch.autograd.grad(out, operands, grad.to(kind))

    out, *naive = plain(dtype)
    truth = plain(torch.float64)[1:]
    assert_exact(y, out)
    for name, actual, t, n in zip(("dx", "dbias"), (dx, dbias), truth, naive, strict=False):
        assert_accurate(actual, t, n, gradient=True, what=name)
    offsets = one.offsets()
    expected, coarse = truth[2].view(-1)[offsets], naive[2].view(-1)[offsets]
    assert_accurate(dvalues, expected, coarse.to(dvalues.dtype), gradient=True, what="dvalues")


def saved_elements(one: sparsity.SparseSet, x: torch.Tensor) -> int:
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        one.linear(x)
    return sum(t.numel() for t in saved if t.is_floating_point())


def test_only_the_columns_that_train_are_saved() -> None:
    weight, x = torch.randn(20, 40), torch.randn(64, 40)
    assert saved_elements(sparsity.columns(weight, [3, 9, 30, 31]), x) == 64 * 4
    assert saved_elements(sparsity.elements(weight, [3, 43, 83, 90]), x) == 64 * 2
    assert saved_elements(sparsity.rows(weight, [3]), x) == 64 * 40
    assert (
        saved_elements(sparsity.rows(weight, [3]), x.requires_grad_()) == 64 * 40 + weight.numel()
    )


def test_layers_over_one_x_keep_one_copy_of_the_columns_they_share() -> None:
    sets = [sparsity.columns(torch.randn(n, 40), [3, 9, 30]) for n in (20, 12)]
    sets.append(copy.deepcopy(sets[0]))
    other = sparsity.columns(torch.randn(20, 40), [3, 9, 31])
    x = torch.randn(64, 40)
    changed = torch.randn(64, 40)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ys = [one.linear(x) for one in sets]
        ys += [other.linear(x), sets[0].linear(changed)]
        first = changed.clone()
        changed.zero_()
        ys.append(sets[1].linear(changed))
    places = [tensor.data_ptr() for tensor in saved]
    assert len(set(places[:3])) == 1
    assert len(set(places)) == 4
    for y, one, read in ((ys[1], sets[1], x), (ys[4], sets[0], first), (ys[5], sets[1], changed)):
        found = torch.autograd.grad(y.sum(), one.values)[0]
        truth = read.double().sum(0)[[3, 9, 30]].repeat_interleave(one.shape[0])
        naive = read.sum(0)[[3, 9, 30]].repeat_interleave(one.shape[0])
        assert_accurate(found, truth, naive, gradient=True)


def test_a_slice_of_x_lives_no_longer_than_what_saved_it() -> None:
    one = sparsity.columns(torch.randn(20, 40), [3, 9])
    x = torch.randn(64, 40)
    y = one.linear(x)
    kept = weakref.ref(y.grad_fn.saved_tensors[0])
    assert kept() is not None
    del y
    assert kept() is None


def test_masked_linear_wants_a_frozen_weight() -> None:
    one = sparsity.rows(torch.randn(4, 4), [1])
    one.weight.requires_grad_()
    with pytest.raises(ValueError, match="masked_linear: expected weight of requires_grad False"):
        one.linear(torch.randn(2, 4))


def test_masked_linear_cannot_be_differentiated_twice() -> None:
    one = sparsity.rows(torch.randn(4, 4), [1])
    x = torch.randn(3, 4, requires_grad=True)
    grads = torch.autograd.grad(one.linear(x).square().sum(), one.values, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        grads[0].sum().backward()


def test_masked_linear_compiles_whole() -> None:
    one = sparsity.columns(torch.randn(8, 10), [1, 5])
    x = torch.randn(6, 10, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(one.linear, backend="aot_eager", fullgraph=True, dynamic=True)
    expected = torch.autograd.grad(one.linear(x).square().sum(), (x, one.values))
    actual = torch.autograd.grad(compiled(x).square().sum(), (x, one.values))
    for a, e in zip(actual, expected, strict=True):
        assert_exact(a, e)


def test_autocast_casts_as_a_plain_layer_does() -> None:
    one = sparsity.rows(torch.randn(8, 16), [1, 5])
    x = torch.randn(6, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = one.linear(x)
        expected = torch.nn.functional.linear(x, one.weight)
    assert_exact(y, expected)
    y.sum().backward()
    assert x.grad.dtype == one.values.grad.dtype == torch.float32


def test_offsets_stand_rectangle_by_rectangle() -> None:
    index = torch.tensor([0, 12])
    assert offsets_of(index, 2, 3, 6).tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]
