"""The masked optimizers: torch.optim's contract, its results, and what stays frozen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pyfastft import optim, sparsity
from pyfastft.testing.tolerance import assert_accurate, assert_exact

CASES = {
    "adamw": (optim.MaskedAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    "adamw-maximize": (optim.MaskedAdamW, torch.optim.AdamW, {"maximize": True}),
    "sgd": (optim.MaskedSGD, torch.optim.SGD, {"weight_decay": 0.1}),
    "sgd-momentum": (optim.MaskedSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2}),
    "sgd-nesterov": (optim.MaskedSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}
ALL = {
    "adamw": lambda p: optim.MaskedAdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: optim.MaskedSGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "lion": lambda p: optim.MaskedLion(p, lr=0.001, weight_decay=0.1),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_torch_on_the_gathered_values(name: str) -> None:
    ours, theirs, options = CASES[name]
    weights = [torch.randn(30, 40), torch.randn(25, 16)]
    sets = [sparsity.select(weights[:1], 0.1)[0], sparsity.blocks(weights[1], [1, 6], (5, 4))]
    frozen = [weight.clone() for weight in weights]
    peers = {}
    for dtype in (torch.float32, torch.float64):
        leaves = [one.values.detach().to(dtype, copy=True).requires_grad_() for one in sets]
        peers[dtype] = leaves, theirs(leaves, lr=0.01, **options)
    optimizer = ours(sets, lr=0.01, **options)
    for _ in range(5):
        for i, one in enumerate(sets):
            one.values.grad = torch.randn_like(one.values)
            for dtype, (leaves, _) in peers.items():
                leaves[i].grad = one.values.grad.to(dtype)
        for stepper in (optimizer, *(peer for _, peer in peers.values())):
            stepper.step()
    for i, one in enumerate(sets):
        truth, naive = peers[torch.float64][0][i].detach(), peers[torch.float32][0][i].detach()
        assert_accurate(one.values.detach(), truth, naive, gradient=True)
        assert_exact(weights[i].view(-1)[one.offsets()], one.values.detach())
        assert_exact(weights[i][~one.mask()], frozen[i][~one.mask()])


def test_lion_is_its_equation() -> None:
    one = sparsity.elements(torch.randn(10, 10), range(0, 100, 3))
    optimizer = optim.MaskedLion([one], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    value, m = one.values.detach().double(), torch.zeros(34, dtype=torch.float64)
    for _ in range(4):
        one.values.grad = torch.randn(34)
        grad = one.values.grad.double()
        value = value * (1 - 0.001) - 0.01 * (0.9 * m + 0.1 * grad).sign()
        m = 0.99 * m + 0.01 * grad
        optimizer.step()
    assert_accurate(one.values.detach(), value, value.float(), gradient=True)


@pytest.mark.parametrize("name", ALL)
def test_a_plain_parameter_trains_whole(name: str) -> None:
    parameter = torch.nn.Parameter(torch.randn(7, 9))
    one = sparsity.whole(parameter.detach().clone())
    scalar = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = ALL[name]([parameter, one, scalar])
    for _ in range(3):
        parameter.grad = torch.randn(7, 9)
        scalar.grad = torch.tensor(1.0)
        one.values.grad = parameter.grad.reshape(-1).clone()
        optimizer.step()
    assert_exact(parameter.detach(), one.weight)
    assert float(scalar.detach()) < 2.0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_dicts_are_exact(name: str, dtype: torch.dtype) -> None:
    """Saved, loaded into a fresh optimizer and trained on: the same bits. A plain parameter of half
    precision keeps its state in float32."""

    def start() -> list[Any]:
        torch.manual_seed(3)
        weight = torch.randn(20, 10).to(dtype)
        return [sparsity.select([weight], 0.2)[0], torch.nn.Parameter(torch.randn(5).to(dtype))]

    def train(params: list[Any], optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(3):
            for param in (params[0].values, params[1]):
                param.grad = torch.randn(param.shape).to(param.dtype)
            optimizer.step()

    straight = start()
    optimizer = ALL[name](straight)
    train(straight, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = copy.deepcopy(straight)
    other = ALL[name](resumed)
    other.load_state_dict(saved)
    for state in other.state.values():
        assert all(t.dtype is torch.float32 for t in state.values())
    train(straight, optimizer, 2)
    train(resumed, other, 2)
    assert_exact(straight[0].weight, resumed[0].weight)
    assert_exact(straight[0].values.detach(), resumed[0].values.detach())
    assert_exact(straight[1].detach(), resumed[1].detach())


def test_groups_schedulers_and_closures() -> None:
    sets = sparsity.select([torch.randn(9, 9), torch.randn(9, 9)], 0.3)
    optimizer = optim.MaskedSGD([{"params": sets[0]}, {"params": [sets[1]], "lr": 0.5}], lr=0.1)
    assert [group["params"][0] for group in optimizer.param_groups] == [s.values for s in sets]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    before = [one.values.detach().clone() for one in sets]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(one.values.sum() for one in sets)
        loss.backward()
        return loss

    assert isinstance(optimizer.step(closure), torch.Tensor)
    scheduler.step()
    optimizer.step(closure)
    for old, one, lr in zip(before, sets, (0.15, 0.75), strict=True):
        assert_accurate(one.values.detach(), old.double() - lr, old - lr, gradient=True)
    optimizer.add_param_group({"params": sparsity.rows(torch.randn(3, 3), [0])})
    assert len(optimizer.param_groups) == 3


def test_a_scaler_skips_what_overflowed() -> None:
    one = sparsity.rows(torch.randn(6, 6), [1, 2])
    optimizer = optim.MaskedAdamW([one], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = one.weight.clone()
    for factor, moves in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(one.linear(torch.ones(2, 6)).sum() * factor).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([one.values], 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(one.weight, before) != moves


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: optim.MaskedAdamW(p, lr=-1), "lr of at least 0"),
        (lambda p: optim.MaskedAdamW(p, betas=(1.0, 0.9)), r"betas\[0\] of at least 0 and below 1"),
        (lambda p: optim.MaskedSGD(p, nesterov=True), "momentum of above 0"),
        (lambda p: optim.MaskedLion(p, weight_decay=float("nan")), "weight_decay"),
    ],
)
def test_options_out_of_range(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make([torch.nn.Parameter(torch.zeros(2))])


def test_a_gradient_of_stochastic_rounding_moves_a_half_precision_weight() -> None:
    """A step far below half a unit of bfloat16: rounded to nearest it is lost, else right on
    average."""
    moved = {}
    for stochastic in (False, True):
        parameter = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = optim.MaskedSGD([parameter], lr=2**-12, stochastic_rounding=stochastic)
        for _ in range(16):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved[stochastic] = 1 - float(parameter.detach().float().mean())
    assert moved[False] == 0
    expected = 16 * 2**-12
    assert 0.8 * expected < moved[True] < 1.2 * expected


@pytest.mark.more
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    """200 steps with decay, momentum, accumulation, clipping and autocast."""
    torch.manual_seed(5)
    weights = [torch.randn(24, 16).to(dtype), torch.randn(8, 24).to(dtype)]
    before = [weight.clone() for weight in weights]
    first = sparsity.elements(weights[0], torch.randperm(24 * 16)[:20])
    second = sparsity.columns(weights[1], [2, 7, 11])
    optimizer = ALL[name]([first, second])
    for _ in range(200):
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(10, 16).to(dtype)
            with torch.autocast("cpu", torch.bfloat16):
                loss = second.linear(first.linear(x).relu()).square().mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_([first.values, second.values], 0.5)
        optimizer.step()
    for one, old in zip((first, second), before, strict=True):
        frozen, now = old.view(-1), one.weight.view(-1)
        keep = ~one.mask().view(-1)
        assert torch.equal(now[keep].view(torch.uint8), frozen[keep].view(torch.uint8))
        assert bool((now[~keep] != frozen[~keep]).any())
        assert_exact(now[one.offsets()], one.values.detach().to(dtype))
