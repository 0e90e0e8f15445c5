"""Weights packed once by layer and by model: the same values, never out of date, always undone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyfastft as ft
from pyfastft.testing.tolerance import assert_accurate, assert_exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = {
    "forward": {},
    "both": {"dx": True},
    "replaced": {"replace": True},
    "both replaced": {"dx": True, "replace": True},
}


def make(kind: str = "linear", dtype: torch.dtype = torch.float32) -> ft.nn.LoRALinear:
    base = Conv1D(24, 40) if kind == "conv1d" else nn.Linear(40, 24)
    base = base.to(dtype).requires_grad_(False)
    layer = ft.nn.LoRALinear(base, r=3, scale=1.5, init="random")
    return layer


def run(layer: ft.nn.LoRALinear, x: torch.Tensor) -> list[torch.Tensor]:
    """y, dX, dA and dB."""
    x = x.detach().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, layer.lora_a, layer.lora_b], weights)]


def assert_like(found, truth, naive) -> None:
    for i, (mine, true, plain) in enumerate(zip(found, truth, naive, strict=True)):
        assert_accurate(mine, true, plain, gradient=i > 0, what=f"result {i}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_it_computes_as_unpacked(kind: str, dtype: torch.dtype, mode: str) -> None:
    layer = make(kind, dtype)
    state = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 7, 40, dtype=dtype)
    truth, naive = run(copy.deepcopy(layer).double(), x.double()), run(layer, x)
    layer.pack(**MODES[mode])
    assert layer.packed
    assert layer.weight.is_meta == ("replaced" in mode)
    assert layer.weight.shape == state["weight"].shape
    assert_like(run(layer, x), truth, naive)
    for name, value in layer.state_dict().items():
        assert_exact(value, state[name], name)
    layer.unpack()
    assert not layer.packed
    assert_exact(layer.weight.data, state["weight"], "the weight")
    assert layer.restore().weight is layer.weight


@pytest.mark.parametrize("mode", MODES)
def test_a_packed_weight_is_never_out_of_date(mode: str) -> None:
    """Changed in place, loaded, assigned: the next call computes with what is there."""
    layer, other, x = make(), make(), torch.randn(5, 40)
    layer.pack(**MODES[mode])
    run(layer, x)
    layer.load_state_dict(other.state_dict())
    assert_like(run(layer, x), run(copy.deepcopy(other).double(), x.double()), run(other, x))
    other.reset_parameters()
    state = {name: torch.randn_like(value) for name, value in other.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    layer.requires_grad_(True).weight.requires_grad_(False)
    other.load_state_dict(state)
    assert_like(run(layer, x), run(copy.deepcopy(other).double(), x.double()), run(other, x))
    if "replaced" not in mode:
        with torch.no_grad():
            for one in (layer, other):
                one.weight.mul_(-2)
        assert_like(run(layer, x), run(copy.deepcopy(other).double(), x.double()), run(other, x))


@pytest.mark.parametrize("mode", MODES)
def test_merging_copying_casting_and_files(mode: str) -> None:
    layer, plain = make().eval(), None
    plain = copy.deepcopy(layer)
    x = torch.randn(5, 40)
    truth, naive = run(copy.deepcopy(plain).double(), x.double()), run(plain, x)
    layer.pack(**MODES[mode])
    for one in (layer, plain):
        one.merge(safe=True)
    assert_exact(layer.weight.data, plain.weight.data, "the merged weight")
    assert_exact(layer(x), plain(x), "the merged output")
    for one in (layer, plain):
        one.unmerge()
    assert layer.packed
    assert layer.weight.is_meta == ("replaced" in mode)
    layer.enabled = False
    assert_exact(layer(x), plain.base(x), "the base's output")
    layer.enabled = True
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twins.append(make())
    twins[-1].load_state_dict(torch.load(file, weights_only=True))
    for twin in (layer, *twins):
        assert_like(run(twin, x), truth, naive)
        twin.to("cpu")
        assert_like(run(twin, x), truth, naive)
        assert_exact(twin.restore().weight.data, plain.weight.data, "the weight")
    layer.pack(**MODES[mode])
    low = copy.deepcopy(plain).bfloat16()
    layer.bfloat16()
    half = x.bfloat16()
    assert layer.packed
    assert_like(run(layer, half), run(copy.deepcopy(low).double(), half.double()), run(low, half))
    layer.double()
    assert not layer.packed
    assert_exact(layer.weight.data, low.weight.data.double(), "the weight in float64")


def test_a_copy_of_what_is_out_of_date_is_not() -> None:
    layer, x = make(), torch.randn(3, 40)
    layer.pack()
    with torch.no_grad():
        layer.weight.neg_()
    twin = copy.deepcopy(layer)
    layer.unpack()
    assert_like(
        [twin(x).detach()], [copy.deepcopy(layer).double()(x.double()).detach()], [layer(x)]
    )


@pytest.mark.parametrize("mode", MODES)
def test_autocast_to_another_dtype_takes_the_plain_weight(mode: str) -> None:
    layer, x = make(), torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
    layer.pack(**MODES[mode])
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(layer(x), expected, "the output under autocast")
    with pytest.raises(TypeError, match="weight of dtype float16 to match x"):
        layer(x.half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.weight.requires_grad_(True), "it trains"),
        (lambda layer: layer.double(), "it is of dtype float64"),
        (lambda layer: layer.to("meta"), "it is on meta"),
        (lambda layer: layer.merge(), "the adapter is merged"),
    ],
)
def test_what_is_not_packed(change, message: str) -> None:
    layer = make()
    change(layer)
    with pytest.raises(ValueError, match=f"expected a weight that can be packed, {message}"):
        layer.pack()
    assert not layer.packed


def test_a_weight_that_trains_again_gets_its_gradient() -> None:
    layer, x = make(), torch.randn(3, 40)
    layer.pack()
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_packed_and_undone(mode: str) -> None:
    model = nn.ModuleDict(
        {"a": nn.Linear(8, 8), "b": nn.Sequential(nn.Linear(8, 4)), "e": nn.Embedding(5, 8)}
    )
    base = copy.deepcopy(model)
    for call in (ft.pack, ft.unpack):
        with pytest.raises(ValueError, match="expected a model with adapters"):
            call(model)
    ft.convert(model, ft.LoRA(r=2, targets=["a", "b.0", "e"], bias="all", init="random"))
    state = copy.deepcopy(model.state_dict())
    model["b"][0].weight.requires_grad_(True)
    report = ft.pack(model, **MODES[mode])
    assert report.changed == ("a",)
    assert report.skipped == {"b.0": "it trains", "e": "no linear layer with a plain weight"}
    for name, value in model.state_dict().items():
        assert_exact(value, state[name], name)
    assert ft.unpack(model).changed == ("a",)
    assert ft.unpack(model).skipped == {"a": "not packed", "b.0": "not packed"}
    ft.pack(model, **MODES[mode])
    ft.revert(model)
    for name, value in model.state_dict().items():
        assert_exact(value, base.state_dict()[name], name)
    assert isinstance(model["a"], nn.Linear)
    only = nn.ModuleList([nn.Embedding(5, 8)])
    ft.convert(only, ft.LoRA(r=2, targets=["0"]))
    why = r"\(0: no linear layer with a plain weight\)"
    with pytest.raises(ValueError, match=rf"can be packed, got none {why}"):
        ft.pack(only)


@pytest.mark.more
def test_it_compiles_whole() -> None:
    layer, x = make(), torch.randn(3, 40)
    for mode in MODES.values():
        layer.pack(**mode)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        expected = run(layer, x)
        x_ = x.clone().requires_grad_()
        y = compiled(x_)
        assert_exact(y.detach(), expected[0], "the compiled output")
        layer.unpack()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_row_squares_are_kept_and_never_out_of_date(dtype: torch.dtype) -> None:
    squares, weight = ft.nn.RowSquares(), nn.Parameter(torch.randn(5, 40, dtype=dtype))

    def expect(found: torch.Tensor, weight: torch.Tensor) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        naive = weight.detach().to(wide).square().sum(1)
        assert_accurate(found, weight.detach().double().square().sum(1), naive)

    first = squares(weight)
    expect(first, weight)
    assert squares(weight) is first
    assert not first.requires_grad
    with torch.no_grad():
        weight.mul_(3)
    expect(squares(weight), weight)
    other = nn.Parameter(torch.randn(5, 40, dtype=dtype))
    expect(squares(other), other)
    twin = copy.deepcopy(squares)
    expect(twin(weight), weight)
    expect(squares(other), other)
