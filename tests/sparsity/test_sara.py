"""SaRA: the polar factor and the low-rank loss against dense decompositions; the second choice."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import pyfastft as ft
from pyfastft import sparsity
from pyfastft.testing.tolerance import assert_accurate, assert_exact

# N, K, density: wide, tall, square, and with rows and columns of nothing.
SHAPES = [(40, 90, 0.2), (90, 40, 0.3), (64, 90, 1.0), (30, 80, 0.05)]


def drawn(n: int, k: int, density: float) -> torch.Tensor:
    return torch.randn(n, k) * (torch.rand(n, k) < density)


def by_inverse_root(matrix: torch.Tensor) -> torch.Tensor:
    """(A A^T)^(-1/2) A, the expression without a decomposition of A itself."""
    squares, u = torch.linalg.eigh(matrix @ matrix.T)
    kept = squares > squares[-1] * 1e-5
    roots = torch.where(kept, squares.clamp(min=0).rsqrt(), 0)
    return (u * roots) @ u.T @ matrix


def by_decomposition(matrix: torch.Tensor) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u * (s > s[0] * 1e-5)) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_polar_factor_is_that_of_the_decomposition(shape: Any, scale: float) -> None:
    matrix = scale * drawn(*shape)
    truth = by_decomposition(matrix.double())
    # A gradient where it is used: of the entries that are not zero.
    at = matrix != 0
    found, naive = sparsity.polar_factor(matrix), by_inverse_root(matrix)
    assert_accurate(found[at], truth[at], naive[at], gradient=True)
    wide = sparsity.polar_factor(matrix.double())
    assert_accurate(wide[at].float(), truth[at], truth[at].float())


def test_the_polar_factor_of_small_singular_values() -> None:
    """What the first polynomials alone leave below 1."""
    matrix = torch.diag(torch.tensor([1, 0.5, 4e-4], dtype=torch.float64))
    assert_exact(sparsity.polar_factor(matrix).float().round(decimals=7), torch.eye(3))


def test_the_polar_factor_of_nothing_is_nothing() -> None:
    assert_exact(sparsity.polar_factor(torch.zeros(3, 5)), torch.zeros(3, 5))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[2](self.layers[1](self.layers[0](x).tanh()).tanh())


def tuned(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any, Any]:
    model = Model().to(dtype)
    ft.convert(model, ft.MaskedTuning(method="sara", density=0.3))
    optimizer = ft.optim.MaskedAdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    options = {"steps": 8, "rank_weight": 0.1, "least_side": 10, **options}
    return model, optimizer, sparsity.SaRA(model, optimizer, **options)


def test_the_loss_is_the_dense_nuclear_norm_and_reaches_the_trained_values() -> None:
    """In float64, with the gradient that autograd takes through a dense decomposition."""
    model, _, tuner = tuned(torch.float64, every_layer=True)
    loss = tuner.loss()
    loss.backward()
    sets = sparsity.sets_of(model)
    total = torch.zeros((), dtype=torch.float64)
    for name, one in sets.items():
        if name == "layers.2.weight":  # too small a side
            assert one.values.grad is None
            continue
        dense = (one.weight * one.mask()).requires_grad_()
        norm = 0.1 * torch.linalg.matrix_norm(dense, ord="nuc")
        (expected,) = torch.autograd.grad(norm, dense)
        total += norm.detach()
        expected = expected.view(-1)[one.offsets()]
        assert bool(expected.abs().min() > 0)
        assert_accurate(one.values.grad.float(), expected, expected.float(), what=name)
    assert_accurate(loss.detach().float(), total, total.float(), what="the loss")


def test_a_step_draws_one_layer_and_all_ranks_the_same() -> None:
    order = []
    for _ in range(2):
        torch.manual_seed(0)
        model, _, tuner = tuned(seed=3)
        torch.rand(len(order))
        for _ in range(12):
            model.zero_grad()
            tuner.loss().backward()
            reached = [n for n, p in model.named_parameters() if p.grad is not None]
            assert len(reached) == 1
            order += reached
    assert order[:12] == order[12:]
    assert len(set(order)) == 2


def test_the_loss_lowers_the_norm() -> None:
    model, optimizer, tuner = tuned(every_layer=True)
    before = float(tuner.loss().detach())
    state = copy.deepcopy(model.state_dict())
    chosen = {name: one.mask() for name, one in sparsity.sets_of(model).items()}
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = tuner.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(tuner.loss().detach()) < 0.9 * before
    for name, mask in chosen.items():
        assert_exact(model.get_parameter(name)[~mask], state[name][~mask], name)


def test_halfway_what_has_grown_stops_and_state_begins_anew() -> None:
    model, optimizer, tuner = tuned()
    state = copy.deepcopy(model.state_dict())
    sets = sparsity.sets_of(model)
    largest = max(float(one.values.detach().abs().max()) for one in sets.values())
    assert tuner.threshold == math.nextafter(largest, math.inf)
    assert tuner.learning_rate == 1e-3 * math.exp(-350 * tuner.threshold)
    first = {name: one.mask() for name, one in sets.items()}
    for step in range(8):
        ((model(torch.randn(16, 20)) - 2).square().mean() + tuner.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            middle = copy.deepcopy(model.state_dict())
        tuner.step()
        if step == 3:
            assert all(not optimizer.state[one.values] for one in sets.values())
            for name, one in sets.items():
                small = middle[name].abs() < tuner.threshold
                assert_exact(one.mask(), first[name] & small, name)
            assert 0 < sum(map(len, sets.values())) < sum(int(m.sum()) for m in first.values())
    for name, one in sets.items():
        assert float(optimizer.state[one.values]["step"]) == 4
        stopped = first[name] & ~one.mask()
        now = model.get_parameter(name)
        assert_exact(now[stopped], middle[name][stopped], name)
        assert bool((now != middle[name])[one.mask()].any())
        assert_exact(one.changed().mask(), first[name], name)
    ft.revert(model, weights="original")
    for name, value in model.state_dict().items():
        assert_exact(value, state[name], name)


def test_a_layer_may_be_left_with_nothing() -> None:
    model, optimizer, tuner = tuned(steps=2, threshold=0.01)
    with torch.no_grad():
        for one in list(sparsity.sets_of(model).values())[:2]:
            one.values.fill_(0.5)
            one.write()
    for _ in range(3):
        (model(torch.randn(4, 20)).square().mean() + tuner.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        tuner.step()
    lengths = [len(one) for one in sparsity.sets_of(model).values()]
    assert lengths[:2] == [0, 0]
    assert lengths[2] > 0


def test_what_cannot_be_tuned() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(
        ValueError, match=r"SaRA: expected model of weights of which single entries"
    ):
        sparsity.SaRA(model, optimizer, steps=2)
    ft.convert(model, ft.MaskedTuning(method="sara", density=0.3))
    with pytest.raises(ValueError, match=r"a layer with sides above 64, got \[\(6, 20\), "):
        sparsity.SaRA(model, optimizer, steps=2)
    assert float(sparsity.SaRA(model, optimizer, steps=2, rank_weight=0).loss()) == 0


@pytest.mark.more
def test_transformers_trainer_trains_it(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config)
    state = copy.deepcopy(model.state_dict())
    ft.convert(model, ft.MaskedTuning(method="sara", density=0.2))
    first = {name: one.mask() for name, one in sparsity.sets_of(model).items()}
    optimizer = ft.optim.MaskedAdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    tuner = sparsity.SaRA(model, optimizer, steps=4, least_side=8)
    data = [{"input_ids": torch.randint(0, 31, (6,)), "labels": i % 2} for i in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        optimizers=(optimizer, schedule),
        callbacks=[tuner.callback()],
    ).train()
    assert tuner.done == 4
    assert all(float(optimizer.state[one.values]["step"]) == 2 for one in tuner.sets)
    for name, value in model.state_dict().items():
        moved = value != state[name]
        assert not (moved & ~first.get(name, torch.zeros(()).bool())).any(), name
        assert bool(moved.any()) == (name in first), name
