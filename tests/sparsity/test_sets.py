"""SparseSet: layouts, choice, bit-exact revert, regrowing, perturbations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from pyfastft import optim, sparsity
from pyfastft.testing.tolerance import assert_exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def made(weight: torch.Tensor) -> dict[str, sparsity.SparseSet]:
    return {
        "element": sparsity.elements(weight, [7, 3, 20]),
        "rows": sparsity.rows(weight, [2, 0]),
        "columns": sparsity.columns(weight, torch.tensor([3])),
        "blocks": sparsity.blocks(weight, [1], (2, 3)),
        "heads": sparsity.heads(weight, [1], 3, along="columns"),
        "whole": sparsity.whole(weight),
        "hashed": sparsity.hashed(weight, 9, seed=5),
        "nonzero": sparsity.nonzero(weight),
    }


def test_every_layout_covers_what_it_says() -> None:
    weight = torch.randn(4, 6)
    weight[1, 2:] = 0
    sets = made(weight)
    assert all(one.layout == name for name, one in sets.items())
    numbers = torch.arange(24).view(4, 6)
    covered = {name: numbers[one.mask()].tolist() for name, one in sets.items()}
    assert covered["element"] == [3, 7, 20]
    assert covered["rows"] == [*range(6), *range(12, 18)]
    assert covered["columns"] == [3, 9, 15, 21]
    assert covered["blocks"] == [3, 4, 5, 9, 10, 11]
    assert covered["heads"] == [n for n in range(24) if n % 6 >= 3]
    assert covered["whole"] == list(range(24))
    assert len(covered["hashed"]) == 9
    assert covered["nonzero"] == [n for n in range(24) if n not in range(8, 12)]
    for one in sets.values():
        assert_exact(one.values.detach(), weight.view(-1)[one.offsets()])
        assert not one.weight.requires_grad


def test_blocks_are_numbered_along_the_grid() -> None:
    one = sparsity.blocks(torch.zeros(4, 6), [0, 3], (2, 3))
    assert one.index.tolist() == [0, 15]


def test_a_hashed_set_is_a_function_of_size_and_seed() -> None:
    first, second = (sparsity.hashed(torch.randn(50, 40), 100, seed=3) for _ in range(2))
    assert_exact(first.index, second.index)
    assert dict(first.recipe) == {"seed": 3, "count": 100}
    other = sparsity.hashed(torch.randn(50, 40), 100, seed=4)
    assert not torch.equal(first.index, other.index)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda w: sparsity.elements(w, [1, 1]), "distinct"),
        (lambda w: sparsity.elements(w, [24]), "below 24"),
        (lambda w: sparsity.elements(w, torch.ones(3, dtype=torch.bool)), r"shape \(4, 6\)"),
        (lambda w: sparsity.rows(w, [0.5]), "integers"),
        (lambda w: sparsity.blocks(w, [0], (3, 2)), "divisor of 4"),
        (lambda w: sparsity.blocks(w, [8], (2, 2)), "below 6"),
        (lambda w: sparsity.heads(w, [0], 4, along="columns"), "divisor of 6"),
        (lambda w: sparsity.heads(w, [0], 2, along="depth"), "rows or columns"),
        (lambda w: sparsity.rows(w.T, [0]), "C-contiguous"),
        (lambda w: sparsity.SparseSet(w, torch.tensor([3, 1])), "ascending"),
        (lambda w: sparsity.select([w], 1.5), "density"),
        (lambda w: sparsity.select([w], 0.5, scored=[w.T]), "shapes"),
    ],
)
def test_what_makes_no_set(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(torch.randn(4, 6))


def test_a_choice_is_global_or_per_tensor() -> None:
    weights = [torch.randn(20, 30), 10 * torch.randn(10, 30)]
    together = sparsity.select(weights, 0.1)
    assert sum(map(len, together)) == 90
    apart = sparsity.select(weights, 0.1, per_tensor=True)
    assert [len(one) for one in apart] == [60, 30]
    assert len(together[1]) > len(together[0])
    grads = [torch.randn_like(weight) for weight in weights]
    for one, grad in zip(
        sparsity.select(weights, 0.1, scored=grads, per_tensor=True), grads, strict=True
    ):
        expected = grad.abs().view(-1).topk(len(one)).indices.sort().values
        assert_exact(one.index.long(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["element", "rows", "columns", "blocks", "whole"])
def test_apply_and_revert_are_exact(dtype: torch.dtype, layout: str) -> None:
    weight = torch.randn(4, 6).to(dtype)
    weight[0, 3], weight[2, 1] = float("nan"), float("inf")
    before = weight.clone()
    one = made(weight)[layout]
    base = one.entries()
    with torch.no_grad():
        one.values.add_(torch.randn_like(one.values))
    one.write()
    assert_exact(weight.view(-1)[one.offsets()], one.values.detach().to(dtype))
    assert_exact(weight[~one.mask()], before[~one.mask()])
    one.write(base)
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))
    one.read()
    assert_exact(one.values.detach(), base.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_perturbation_is_taken_back(dtype: torch.dtype) -> None:
    weights = [torch.randn(30, 20).to(dtype) for _ in range(2)]
    before = [weight.clone() for weight in weights]
    sets = sparsity.select(weights, 0.2)

    def perturb() -> None:
        with sparsity.restored(sets):
            for one in sets:
                one.write(torch.ones(len(one)), alpha=0.05)
            assert not torch.equal(weights[0], before[0])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        perturb()
    for weight, old in zip(weights, before, strict=True):
        assert_exact(weight, old)


def test_packed_values_lie_in_one_tensor() -> None:
    weights = [torch.randn(8, 8) for _ in range(3)]
    sets = sparsity.select(weights, 0.25)
    parameters = [one.values for one in sets]
    arena = sparsity.pack(sets)
    assert all(one.values is parameter for one, parameter in zip(sets, parameters, strict=True))
    arena.zero_()
    assert all(not one.values.detach().any() for one in sets)
    with pytest.raises(ValueError, match="one device and dtype"):
        sparsity.pack([])


def test_a_copy_of_a_set_is_its_own() -> None:
    one = sparsity.hashed(torch.randn(6, 6), 4, seed=1)
    other = copy.deepcopy(one)
    assert other.values.sparse_set is other
    other.weight.zero_()
    assert bool(one.weight.any())


def test_a_pickled_set_is_itself_again() -> None:
    one = sparsity.hashed(torch.randn(6, 6), 4, seed=1)
    other = pickle.loads(pickle.dumps(one))
    assert other.values.sparse_set is other
    assert dict(other.recipe) == {"seed": 1, "count": 4}
    assert other.values.requires_grad
    assert_exact(other.values.detach(), one.values.detach())
    assert_exact(other.mask(), one.mask())


def trained(sets: list[sparsity.SparseSet], steps: int = 3) -> optim.MaskedAdamW:
    optimizer = optim.MaskedAdamW(sets, lr=0.01)
    for _ in range(steps):
        for one in sets:
            one.values.grad = torch.randn_like(one.values)
        optimizer.step()
    return optimizer


def test_regrowing_carries_values_and_state() -> None:
    weights = [torch.randn(20, 30), torch.randn(10, 30)]
    sets = sparsity.select(weights, 0.1)
    optimizer = trained(sets)
    old = [(one.index.clone(), one.values.detach().clone()) for one in sets]
    moments = [optimizer.state[one.values]["exp_avg"].clone() for one in sets]
    scores = [torch.randn_like(weight) for weight in weights]
    before = [weight.clone() for weight in weights]
    sources = sparsity.regrow(
        sets, scores, 20, optimizer=optimizer, seeds={"exp_avg": scores}, dropped_to="zero"
    )
    assert sum(map(len, sets)) == 90
    assert sum(int((source < 0).sum()) for source in sources) == 20
    kept = torch.cat([values.abs() for _, values in old]).topk(70).values.min()
    for i, (one, source) in enumerate(zip(sets, sources, strict=True)):
        stays = source >= 0
        index, values = old[i]
        assert_exact(one.index[stays], index[source[stays]])
        assert_exact(one.values.detach()[stays], values[source[stays]])
        assert bool((values[source[stays]].abs() >= kept).all())
        state = optimizer.state[one.values]
        assert_exact(state["exp_avg"][stays], moments[i][source[stays]])
        grown = one.index[~stays].long()
        assert_exact(state["exp_avg"][~stays], scores[i].view(-1)[grown])
        assert not state["exp_avg_sq"][~stays].any()
        assert_exact(one.values.detach()[~stays], before[i].view(-1)[grown])
        dropped = set(index.tolist()) - set(one.index.tolist())
        assert not weights[i].view(-1)[list(dropped)].any()
        x = torch.randn(4, 30)
        one.linear(x).sum().backward()
        assert one.values.grad.shape == one.values.shape
    optimizer.step()


def test_regrowing_by_the_change_returns_to_the_base() -> None:
    weight = torch.randn(12, 10)
    base = weight.clone()
    sets = sparsity.select([weight], 0.25)
    trained(sets)
    index = set(sets[0].index.tolist())
    sparsity.regrow(sets, [torch.randn(12, 10)], 8, base=[base], dropped_to="base")
    dropped = list(index - set(sets[0].index.tolist()))
    assert len(dropped) == 8
    assert_exact(weight.view(-1)[dropped], base.view(-1)[dropped])


def test_what_cannot_regrow() -> None:
    weight = torch.randn(4, 6)
    with pytest.raises(ValueError, match="single elements"):
        sparsity.regrow([sparsity.rows(weight, [1])], [weight], 1)
    one = sparsity.elements(weight, [1, 2])
    with pytest.raises(ValueError, match="at most 2"):
        sparsity.regrow([one], [weight], 3)
    with pytest.raises(ValueError, match="dropped_to"):
        sparsity.regrow([one], [weight], 1, dropped_to="base")


def test_the_sets_of_a_model_go_by_the_names_of_their_weights() -> None:
    layers = [torch.nn.Linear(6, 4) for _ in range(3)]
    model = torch.nn.ModuleDict({"a": layers[0], "b": torch.nn.Sequential(*layers[1:])})
    assert sparsity.sets_of(model) == {}
    sets = [sparsity.rows(layer.weight, [1]) for layer in layers[::2]]
    for layer, one in zip(layers[::2], sets, strict=True):
        layer.register_parameter("values", one.values)
    # A layer that shares the weight of another: the first name counts.
    tied = model["tied"] = torch.nn.Linear(6, 4)
    tied.weight = layers[0].weight
    tied.register_parameter("values", sets[0].values)
    assert sparsity.sets_of(model) == {"a.weight": sets[0], "b.1.weight": sets[1]}
    assert sparsity.sets_of(layers[0]) == {"weight": sets[0]}


def test_the_origin_holds_all_that_trained_whatever_was_dropped_or_grown() -> None:
    weights = [torch.randn(20, 30).bfloat16(), torch.randn(10, 30).bfloat16()]
    before = [weight.clone() for weight in weights]
    sets = sparsity.select(weights, 0.1)
    assert sets[0].changed() is sets[0]
    with pytest.raises(ValueError, match="expected origin of entries kept before training"):
        sets[0].restore()
    for one in sets:
        one.keep_origin()
    first = [one.mask() for one in sets]
    trained(sets)
    scores = [torch.randn_like(weight) for weight in weights]
    sparsity.regrow(sets, scores, 20, dropped_to="zero")
    trained(sets)
    for one, old, mask in zip(sets, before, first, strict=True):
        both = one.changed()
        assert_exact(both.mask(), mask | one.mask())
        assert_exact(both.values.detach(), one.weight.view(-1)[both.offsets()].float())
        assert int((one.weight != old)[both.mask()].sum()) > 0
        assert not (one.weight != old)[~both.mask()].any()
        one.restore()
        assert_exact(one.weight, old)
        assert_exact(one.values.detach(), one.entries().float())
