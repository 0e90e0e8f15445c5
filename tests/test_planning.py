"""ft.plan: bytes that training really takes, times of this machine, and honest notes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import pyfastft as ft
from pyfastft.planning import Cost, _note
from pyfastft.sparsity import sets_of


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Layer(32) for _ in range(2)], nn.Linear(32, 3))


def _held(model: nn.Module) -> int:
    """What training holds beside the weights: sets, gradients, state."""
    sets = sets_of(model)
    optimizer = ft.optim.MaskedAdamW(sets.values())
    x = torch.randn(8, 32)
    model(x).square().sum().backward()
    optimizer.step()
    total = 0
    for one in sets.values():
        state = optimizer.state[one.values]
        parts = [one.values.grad, state["exp_avg"], state["exp_avg_sq"]]
        total += one.nbytes + sum(part.numel() * part.element_size() for part in parts)
    return total


@pytest.mark.parametrize(
    "config",
    [
        ft.MaskedTuning(method="sara", density=0.05, targets=["up", "down"]),
        ft.MaskedTuning(method="sara", threshold=0.01, targets=["up", "down"]),
        ft.MaskedTuning(density=0.125, layout="columns", targets=["up", "down"]),
    ],
)
def test_what_is_held_is_what_training_holds(config: ft.MaskedTuning) -> None:
    model = _model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    planned = ft.plan(model, config, batch=4, seq=4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    kept = planned.cost.held
    calibration = None if config.method == "sara" else [torch.randn(8, 32)]
    loss = None if calibration is None else lambda model, x: model(x).square().sum()
    ft.convert(model, config, calibration=calibration, loss=loss)
    held = _held(model)
    if config.method == "sara":
        sets = sets_of(model)
        assert {f"{one.name}.weight": one.trained for one in planned.layers} == {
            name: len(sets[name]) for name in sets
        }
    assert abs(kept - held) <= 0.05 * held


def test_what_is_saved_and_what_runs() -> None:
    model = _model().bfloat16()
    config = ft.MaskedTuning(density=0.125, layout="columns", targets=["up"], exclude=["1.up"])
    planned = ft.plan(model, config, batch=2, seq=8)
    (layer,) = planned.layers
    assert (layer.name, layer.shape, layer.trained) == ("0.up", (64, 32), 256)
    assert (layer.cost.saved, layer.full.saved) == (16 * 4 * 2, 16 * 32 * 2)
    assert layer.full.held == 3 * 64 * 32 * 2
    assert (
        layer.backend
        == ft.explain(
            "masked_weight_grad",
            *(torch.ones(16, 64).bfloat16(), torch.ones(16, 32).bfloat16()),
            *(torch.tensor([0]), 64, 1),
        ).chosen
    )
    assert min(layer.cost.weight_gradient, layer.full.weight_gradient, layer.cost.step) > 0
    assert planned.skipped == {"1.up": "excluded"}
    assert json.loads(json.dumps(planned.to_dict()))["layers"][0]["name"] == "0.up"
    text = str(planned)
    assert "\n0.up" in text
    assert "left alone, 1.up: excluded" in text


def test_layers_of_one_kind_are_one_line() -> None:
    config = ft.MaskedTuning(method="sara", density=0.1, targets=["up"])
    text = str(ft.plan(_model(), config, batch=4))
    assert "2 x *.up" in text
    assert text.count(".up") == text.count("*.up")


def test_a_mask_that_saves_no_time_says_so() -> None:
    def cost(gradient: float, step: float) -> Cost:
        return Cost(1, 1, 1.0, 1.0, gradient, step)

    full = cost(1.0, 1.0)
    assert _note("element", 0.01, cost(0.5, 0.1), full) == ""
    assert "(gradient)" in _note("element", 0.5, cost(0.97, 0.1), full)
    assert "rows, columns or blocks can be" in _note("element", 0.5, cost(0.97, 0.1), full)
    assert "(gradient, step)" in _note("rows", 0.9, cost(0.96, 2.0), full)


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (TypeError, "config of type MaskedTuning", {"config": ft.LoRA()}),
        (ValueError, "batch of at least 1", {"batch": 0}),
        (ValueError, "seq of at least 1", {"seq": True}),
        (ValueError, "plan: expected targets", {"config": ft.MaskedTuning(targets=["nothing"])}),
    ],
)
def test_bad_input(kind: type[Exception], message: str, options: dict) -> None:
    given = {"config": ft.MaskedTuning(), "batch": 1, **options}
    with pytest.raises(kind, match=message):
        ft.plan(_model(), given.pop("config"), **given)
