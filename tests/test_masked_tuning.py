"""Training some entries of a model's weights: conversion in place and back, and what is chosen."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyfastft as ft
from pyfastft import sparsity
from pyfastft.testing.tolerance import assert_accurate, assert_exact

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.norm(x + self.drop(self.down(self.up(x).tanh())))


class Model(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 5)
        self.unused = nn.Linear(WIDTH, 3)

    def forward(self, tokens, checkpointed=None):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x) if checkpointed is None else checkpointed(block, x)
        return self.head(x)


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch).flatten(0, 1).float(), batch.flatten() % 5)


BATCHES = [torch.arange(10).view(2, 5) + i for i in (0, 1)]
SAFT = ft.MaskedTuning(density=0.1, exclude=["unused"])


def convert(model: nn.Module, config: ft.MaskedTuning = SAFT) -> ft.Report:
    return ft.convert(model, config, calibration=BATCHES, loss=loss_of)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, steps: int = 3, **options: Any) -> None:
    optimizer = ft.optim.MaskedAdamW(trainable(model), lr=0.01, weight_decay=0.1, **options)
    for step in range(steps):
        loss_of(model, BATCHES[step % 2]).backward()
        optimizer.step()
        optimizer.zero_grad()


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.mask() for name, one in sparsity.sets_of(model).items()}


def summed_gradients(model: nn.Module, names: list[str]) -> list[torch.Tensor]:
    twin = copy.deepcopy(model)
    twin.requires_grad_(True)
    parameters = [twin.get_parameter(name) for name in names]
    sums = [torch.zeros(p.shape) for p in parameters]
    with torch.random.fork_rng():
        for batch in BATCHES:
            for total, grad in zip(
                sums, torch.autograd.grad(loss_of(twin, batch), parameters), strict=True
            ):
                total += grad
    return sums


NAMES = [f"blocks.{i}.{n}.weight" for i in range(2) for n in ("up", "down")] + ["head.weight"]


def test_convert_and_revert() -> None:
    model = Model().eval()
    model.head.bias.requires_grad_(False)
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state, y = copy.deepcopy(model.state_dict()), model(BATCHES[0])
    for weights in ("original", "trained"):
        report = convert(model)
        assert report.trainable == round(0.1 * sum(state[name].numel() for name in NAMES))
        assert report.skipped == {"unused": "excluded"}
        assert {f"{name}.weight" for name in report.changed} == set(sparsity.sets_of(model))
        assert model.state_dict().keys() == state.keys()
        assert bool((model.embed.weight.grad == 1).all())
        assert all(p.grad is None for n, p in model.named_parameters() if "embed" not in n)
        assert_exact(model(BATCHES[0]), y, "the output")
        assert not model.head.training
        train(model)
        trained, mask = copy.deepcopy(model.state_dict()), masks(model)
        for name, value in trained.items():
            moved = value != state[name]
            assert bool(moved.any()) == (name in mask)
            assert not (moved & ~mask.get(name, torch.ones(()).bool())).any()
        y_trained = model(BATCHES[0])
        assert ft.revert(model, weights=weights).changed == report.changed
        assert dict(model.named_modules()) == modules
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        expected, output = (state, y) if weights == "original" else (trained, y_trained)
        for name, value in model.state_dict().items():
            assert_exact(value, expected[name], name)
        assert_exact(model(BATCHES[0]), output, "the output")
    with pytest.raises(ValueError, match=r"revert: expected a model that convert\(\) changed"):
        ft.revert(model)


@pytest.mark.parametrize("passes", [1, 2, 9])
@pytest.mark.parametrize("training", [False, True])
def test_saft_chooses_the_largest_summed_gradients(passes: int, training: bool) -> None:
    """By the dense sums; dropout draws the same numbers in every pass and leaves the generator."""
    model = Model().train(training)
    torch.manual_seed(7)
    sums = summed_gradients(model, NAMES)
    expected = sparsity.select([torch.zeros_like(s) for s in sums], 0.1, scored=sums)
    before = torch.get_rng_state()
    config = ft.MaskedTuning(density=0.1, exclude=["unused"], passes=passes)
    convert(model, config)
    assert torch.equal(before, torch.get_rng_state())
    found = sparsity.sets_of(model)
    for name, one in zip(NAMES, expected, strict=True):
        if len(one):
            assert_exact(found[name].index, one.index, name)
        else:
            assert name not in found


@pytest.mark.parametrize("layout", ["rows", "columns", "blocks"])
def test_structured_layouts_take_the_groups_of_the_largest_mean(layout: str) -> None:
    model = Model().eval()
    sums = summed_gradients(model, [name for name in NAMES if "head" not in name])
    config = ft.MaskedTuning(density=0.3, layout=layout, block=4, targets=["up", "down"], passes=2)
    convert(model, config)
    found = masks(model)
    means, sizes, chosen = [], [], []
    for name, total in zip(NAMES, sums, strict=False):
        n, k = total.shape
        height, width = {"rows": (1, k), "columns": (n, 1), "blocks": (4, 4)}[layout]
        mask = found.get(name, torch.zeros(n, k).bool())
        for i in range(0, n, height):
            for j in range(0, k, width):
                part = mask[i : i + height, j : j + width]
                assert bool(part.all()) == bool(part.any()), "a group is chosen whole"
                means.append(float(total[i : i + height, j : j + width].abs().mean()))
                sizes.append(height * width)
                chosen.append(bool(part.all()))
    budget = round(0.3 * sum(s.numel() for s in sums))
    taken = sum(size for size, c in zip(sizes, chosen, strict=True) if c)
    assert budget - max(sizes) < taken <= budget
    worst = min(m for m, c in zip(means, chosen, strict=True) if c)
    assert all(m <= worst for m, c in zip(means, chosen, strict=True) if not c)
    x = torch.randint(0, 11, (2, 5))
    loss_of(model, x).backward()
    assert all(one.values.grad is not None for one in sparsity.sets_of(model).values())


def test_sara_chooses_the_smallest_weights() -> None:
    model = Model()
    ft.convert(model, ft.MaskedTuning(method="sara", threshold=0.05))
    for name, mask in masks(model).items():
        assert_exact(mask, model.get_parameter(name).abs() < 0.05)
    ft.revert(model)
    report = ft.convert(model, ft.MaskedTuning(method="sara", density=0.2, targets=["up", "down"]))
    chosen = [model.get_parameter(name)[mask] for name, mask in masks(model).items()]
    left = [model.get_parameter(name)[~mask] for name, mask in masks(model).items()]
    assert report.trainable == sum(map(len, chosen)) == round(0.2 * 4 * 2 * WIDTH * WIDTH)
    assert max(float(c.abs().max()) for c in chosen) <= min(float(v.abs().min()) for v in left)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_the_plain_model_at_the_entries(
    reentrant: bool | None, dtype: torch.dtype, autocast: bool
) -> None:
    """Two batches accumulated, with and without activation checkpointing and autocast."""
    base = Model(2).eval().to(dtype)
    model = copy.deepcopy(base)
    convert(model, ft.MaskedTuning(density=0.2, exclude=["unused", "head"]))
    # The reentrant kind wants an input that requires a gradient.
    model.embed.weight.requires_grad_(True)

    def again(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    def gradients(one: nn.Module, call: Callable | None, autocast: bool) -> None:
        for batch in BATCHES:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = one(batch, call)
            y.float().square().mean().backward()

    gradients(model, None if reentrant is None else again, autocast)
    gradients(base, None, autocast)
    truth = copy.deepcopy(base).double()
    truth.zero_grad()
    gradients(truth, None, False)
    for name, one in sparsity.sets_of(model).items():
        offsets = one.offsets()
        naive = base.get_parameter(name).grad.view(-1)[offsets].float()
        expected = truth.get_parameter(name).grad.view(-1)[offsets]
        assert_accurate(one.values.grad, expected, naive, gradient=True, what=name)
        assert model.get_parameter(name).grad is None


def test_a_shared_module_is_converted_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    twin = copy.deepcopy(model)
    config = ft.MaskedTuning(density=0.25)

    def loss(one: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return one(batch).square().sum()

    x = torch.randn(3, 4)
    assert ft.convert(model, config, calibration=[x], loss=loss).changed == ("0",)
    assert model[0] is model[2]
    loss(model, x).backward()
    loss(twin, x).backward()
    one = sparsity.sets_of(model)["0.weight"]
    expected = twin[0].weight.grad.view(-1)[one.offsets()]
    assert_accurate(one.values.grad, expected.double(), expected, gradient=True)
    ft.revert(model)
    assert model[0] is model[2] is shared


def test_tied_layers_share_a_set_and_a_strangers_weight_is_left_alone() -> None:
    model = Model()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    model.head = nn.Linear(WIDTH, 11)
    model.embed.weight = model.head.weight
    twin = copy.deepcopy(model).eval()
    model.eval()
    report = convert(model)
    assert report.skipped["head"] == "its weight is embed.weight too"
    assert model.blocks[0].up.trained is model.blocks[1].up.trained
    assert len({id(p) for p in trainable(model)}) == 3
    loss_of(model, BATCHES[0]).backward()
    loss_of(twin, BATCHES[0]).backward()
    one = model.blocks[0].up.trained
    expected = twin.blocks[0].up.weight.grad.view(-1)[one.offsets()]
    assert_accurate(one.values.grad, expected.double(), expected, gradient=True)
    train(model)
    ft.revert(model, weights="original")
    for name, value in model.state_dict().items():
        assert_exact(value, twin.state_dict()[name], name)
    assert model.blocks[0].up.weight is model.blocks[1].up.weight


def test_a_copy_trains_by_itself() -> None:
    model = Model().eval()
    state = copy.deepcopy(model.state_dict())
    convert(model)
    twin = copy.deepcopy(model)
    train(twin)
    for name, value in model.state_dict().items():
        assert_exact(value, state[name], name)
    train(model)
    for name, value in model.state_dict().items():
        assert_exact(value, twin.state_dict()[name], name)
    ft.revert(nn.Sequential(twin), weights="original")
    for name, value in twin.state_dict().items():
        assert_exact(value, state[name], name)
    assert type(twin.head) is nn.Linear


def test_a_pickle_trains_on() -> None:
    """As processes that are spawned get a model."""
    model = Model().eval()
    convert(model)
    train(model)
    twin = pickle.loads(pickle.dumps(model))
    for one in (model, twin):
        train(one)
    for name, value in model.state_dict().items():
        assert_exact(value, twin.state_dict()[name], name)
    for name, one in sparsity.sets_of(twin).items():
        assert one.weight is twin.get_parameter(name)
    ft.revert(twin, weights="original")
    ft.revert(model, weights="original")
    for name, value in model.state_dict().items():
        assert_exact(value, twin.state_dict()[name], name)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_the_plain_models(assign: bool) -> None:
    model, other = Model().eval(), Model().eval()
    convert(model)
    state = other.state_dict()
    assert not any(model.load_state_dict(copy.deepcopy(state), assign=assign))
    for name, one in sparsity.sets_of(model).items():
        assert one.weight is model.get_parameter(name)
        assert_exact(one.values.detach(), state[name].view(-1)[one.offsets()], name)
    assert_exact(model(BATCHES[0]), other(BATCHES[0]), "the output")
    before = copy.deepcopy(model.state_dict())
    train(model)
    for name, mask in masks(model).items():
        moved = model.get_parameter(name) != before[name]
        assert bool(moved.any())
        assert not (moved & ~mask).any()
    reloaded = Model()
    reloaded.load_state_dict(model.state_dict())
    assert_exact(reloaded.eval()(BATCHES[0]), model(BATCHES[0]), "the output")


def test_another_dtype_keeps_the_masters() -> None:
    model = Model().eval()
    state = copy.deepcopy(model.state_dict())
    convert(model)
    loss_of(model, BATCHES[0]).backward()
    values = [one.values.detach().clone() for one in sparsity.sets_of(model).values()]
    model.to(torch.bfloat16)
    for one, old in zip(sparsity.sets_of(model).values(), values, strict=True):
        assert one.weight.dtype is torch.bfloat16
        assert_exact(one.values.detach(), old)
        assert one.values.grad.dtype is torch.float32
    train(model)
    model.float()
    for name, one in sparsity.sets_of(model).items():
        assert_exact(model.get_parameter(name).view(-1)[one.offsets()], one.values.detach())
    chosen = masks(model)
    ft.revert(model, weights="original")
    for name, mask in chosen.items():
        expected = torch.where(mask, state[name], state[name].bfloat16().float())
        assert_exact(model.state_dict()[name], expected, name)


def test_an_optimizer_that_leaves_the_weights_behind_is_noticed() -> None:
    model = Model()
    convert(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    loss_of(model, BATCHES[0]).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"optimizer of pyfastft\.optim"):
        loss_of(model, BATCHES[0])
    for one in sparsity.sets_of(model).values():
        one.write()
    train(model)


def test_a_frozen_set_computes_as_the_plain_layer() -> None:
    model = Model().eval()
    convert(model)
    model.requires_grad_(False)
    assert not model(BATCHES[0]).requires_grad


def test_it_compiles_whole() -> None:
    model = Model().eval()
    convert(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss_of(model, BATCHES[0]), trainable(model))
    for _ in range(2):
        actual = torch.autograd.grad(loss_of(compiled, BATCHES[0]), trainable(model))
    for a, e in zip(actual, expected, strict=True):
        assert_exact(a, e)


def nan_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return loss_of(model, batch) * float("nan")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no calibration": ({"calibration": None}, "expected calibration of batches"),
    "an empty one": ({"calibration": []}, "of one batch or more"),
    "an iterator": (
        {"calibration": iter(BATCHES), "config": ft.MaskedTuning(passes=2)},
        "of a list or a loader to be read 2 times",
    ),
    "not finite": ({"loss": nan_loss}, "finite gradients, got others in blocks.0.up"),
    "no loss": ({"loss": None}, "loss of a function where the batches are no mappings"),
    "no number": ({"loss": lambda m, b: m(b)}, "loss of one number"),
    "no tensor": ({"loss": lambda m, b: 1.0}, "loss of type Tensor, got float"),
    "another number": (
        {"loss": lambda m, b: torch.ones((), requires_grad=True)},
        "depends on a targeted weight",
    ),
    "too sparse": ({"config": ft.MaskedTuning(density=1e-6)}, "a choice of one entry or more"),
    "sara with data": ({"config": ft.MaskedTuning(method="sara")}, "looks at the weights alone"),
    "adapters with data": ({"config": ft.LoRA()}, "look at no data"),
    "no such target": ({"config": ft.MaskedTuning(targets=["upp"])}, "did you mean 'up'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(name: str) -> None:
    changes, says = REFUSED[name]
    model = Model().eval()
    modules = dict(model.named_modules())
    arguments = {"config": SAFT, "calibration": BATCHES, "loss": loss_of, **changes}
    with pytest.raises((ValueError, TypeError), match=f"convert: .*{says}"):
        ft.convert(model, **arguments)
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_conversions_do_not_mix() -> None:
    model = Model()
    convert(model)
    for call in (
        lambda: convert(model),
        lambda: ft.convert(model, ft.LoRA()),
        lambda: ft.quantize(model, ft.PTQ4(group_size=4)),
    ):
        with pytest.raises(ValueError, match=r"trains in part already \(blocks\.0"):
            call()
    with pytest.raises(ValueError, match="revert: expected weights of 'trained' or 'original'"):
        ft.revert(model, weights="both")
    ft.revert(model)
    ft.convert(model, ft.LoRA())
    with pytest.raises(ValueError, match="adapters already"):
        convert(model)


def test_what_cannot_train_in_part_has_a_reason() -> None:
    model = Model().eval()
    config = ft.MaskedTuning(density=0.3, targets=".*", layout="blocks", block=16)
    model.blocks[1].up.weight.data = torch.randn(WIDTH, 2 * WIDTH).T
    with pytest.raises(ValueError, match=r"Embedding is no nn\.Linear"):
        convert(model, config)
    skipped = convert(model, ft.MaskedTuning(density=0.3, targets=".*")).skipped
    assert skipped["blocks.1.up"] == "its weight has strides (1, 16)"
    assert skipped["unused"] == "the loss does not depend on it"
    assert skipped["embed"] == "Embedding is no nn.Linear"
    ft.revert(model)
    config = ft.MaskedTuning(density=0.9, targets=["up", "head"], layout="blocks", block=8)
    assert convert(model, config).skipped["head"] == "blocks of 8 do not tile its weight 5 x 8"


def test_a_layer_over_a_strange_set() -> None:
    base = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="MaskedLinear: expected trained of a set of the base's"):
        ft.nn.MaskedLinear(base, sparsity.rows(torch.zeros(4, 4), [1]))
    with pytest.raises(TypeError, match=r"MaskedLinear: expected base of type nn\.Linear, Tanh"):
        ft.nn.MaskedLinear(nn.Tanh(), sparsity.rows(base.weight, [1]))
