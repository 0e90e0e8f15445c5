"""nn.Int8Linear: the rounding of a weight, gradients, casts, copies, files and refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyfastft as ft
from pyfastft import functional
from pyfastft.testing.tolerance import assert_exact

N, K = 12, 33


def layer_of(seed: int = 0, **options: object) -> ft.nn.Int8Linear:
    torch.manual_seed(seed)
    return ft.nn.Int8Linear.from_linear(nn.Linear(K, N, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_codes_are_the_nearest_ones(dtype: torch.dtype) -> None:
    base = nn.Linear(K, N, dtype=dtype).eval()
    with torch.no_grad():
        base.weight[3] = 0
        base.weight[4] *= 1e3
    calls: list[int] = []
    base.register_forward_hook(lambda *_: calls.append(1))
    before = base.weight.detach().clone()
    layer = ft.nn.Int8Linear.from_linear(base)
    assert layer.codes.dtype is torch.int8
    assert layer.scales.dtype is torch.float32
    assert layer.dtype is layer.weight.dtype is dtype
    assert layer.bias is base.bias
    assert not layer.training
    assert_exact(base.weight.detach(), before, "the layer it was made from")

    w, scales = before.double(), layer.scales.double()
    largest = w.abs().amax(1)
    assert float((scales * 127 - largest).abs().max()) < 1e-6 * float(largest.max())
    error = (layer.codes.double() * scales[:, None] - w).abs()
    assert bool((error <= 0.5 * scales[:, None] * (1 + 1e-5)).all())
    assert sorted(layer.codes.abs().amax(1).tolist()) == [0] + [127] * (N - 1)

    x = torch.randn(2, 5, K, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert calls == [1]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    expected = functional.int8_linear(x, layer.codes, layer.scales.to(wide), bias=layer.bias)
    assert_exact(y.detach(), expected.detach(), "by the op")
    dense = (layer.codes.double() * scales[:, None]).to(dtype).double()
    truth = nn.functional.linear(x.double(), dense, layer.bias.double()).detach()
    small = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    assert float((y - truth).abs().max()) < small * float(truth.abs().max())
    grad = torch.randn_like(y)
    y.backward(grad)
    dx = grad.double() @ dense
    assert float((x.grad - dx).abs().max()) < small * float(dx.abs().max())
    db = grad.double().sum((0, 1))
    assert float((layer.bias.grad - db).abs().max()) < small * float(db.abs().max())
    assert not layer.weight.requires_grad


def test_the_smallest_numbers_keep_their_signs() -> None:
    base = nn.Linear(2, 1, bias=False)
    least = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[185.0, -185.0]]) * least)
    assert ft.nn.Int8Linear.from_linear(base).codes.tolist() == [[127, -127]]
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, -1.0]]) * least)  # the scale is 0
    assert ft.nn.Int8Linear.from_linear(base).codes.tolist() == [[0, 0]]
    assert ft.nn.Int8Linear.from_linear(nn.Linear(0, 3)).codes.shape == (3, 0)


def test_it_survives_copies_casts_and_files(tmp_path: Path) -> None:
    layer, x = layer_of(), torch.randn(4, K)
    y, before = layer(x), {name: b.clone() for name, b in layer.named_buffers()}
    moved = copy.deepcopy(layer)
    assert_exact(moved(x), y, "of a copy")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for cast in (lambda m, to: m.to(to), lambda m, to: m.type(to)):
            cast(moved, dtype)
            for name, value in before.items():
                assert_exact(moved.get_buffer(name), value, name)
            assert moved.weight.dtype is moved(x.to(dtype)).dtype is dtype
    torch.save(layer, tmp_path / "whole.pt")
    assert_exact(torch.load(tmp_path / "whole.pt", weights_only=False)(x), y, "of a pickle")
    state = layer.state_dict()
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    for loaded in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        load_file(tmp_path / "state.safetensors"),
    ):
        for assign in (False, True):
            other = layer_of(1)
            assert not torch.equal(other(x), y)
            other.load_state_dict(loaded, assign=assign)
            assert_exact(other(x), y, "of a file")
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert_exact(empty(x), y, "from the meta device")


def test_states_that_do_not_fit_change_nothing() -> None:
    layer, x = layer_of(), torch.randn(2, K)
    y, state = layer(x), layer.state_dict()
    bad = {
        "codes": (state["codes"].float(), "codes of dtype int8, got float32"),
        "scales": (torch.full((N,), torch.inf), "scales of finite values"),
    }
    for name, (value, message) in bad.items():
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=message):
                layer.load_state_dict({**state, name: value}, assign=assign)
            assert_exact(layer(x), y, "the output")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"scales"'):
        layer.load_state_dict({"codes": state["codes"], "bias": state["bias"]})


def test_refusals() -> None:
    make = ft.nn.Int8Linear.from_linear
    with pytest.raises(TypeError, match=r"expected linear of type nn\.Linear, Conv1d is no"):
        make(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="expected weight of values, got the meta device"):
        make(nn.Linear(2, 2, device="meta"))
    for value in (torch.nan, torch.inf):
        base = nn.Linear(3, 2)
        base.weight.data[1, 1] = value
        with pytest.raises(ValueError, match="expected weight of finite values"):
            make(base)
    wide = nn.Linear(3, 2, dtype=torch.float64)
    wide.weight.data[0, 0] = 1e300
    with pytest.raises(ValueError, match="of float32's range"):
        make(wide)
    codes, scales = torch.zeros(N, K, dtype=torch.int8), torch.ones(N)
    with pytest.raises(TypeError, match="expected codes of dtype int8, got uint8"):
        ft.nn.Int8Linear(codes.to(torch.uint8), scales)
    with pytest.raises(ValueError, match=r"expected scales of shape \(12,\)"):
        ft.nn.Int8Linear(codes, scales[:3])
    with pytest.raises(ValueError, match=r"expected bias of shape \(12,\)"):
        ft.nn.Int8Linear(codes, scales, nn.Parameter(torch.ones(3)))


def test_it_compiles_whole_and_under_autocast() -> None:
    layer = layer_of(bias=False)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(3, K)
    assert float((compiled(x) - layer(x)).abs().max()) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
