"""Layers whose weights have 4 bits and whose activations are rounded to 8: what they compute, what
refuses them, copies, files, and whole models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import pyfastft as ft
from pyfastft import functional
from pyfastft.formats._words import Layer
from pyfastft.quantization import QTensor4, quantize_weight
from pyfastft.quantization.model import weights
from pyfastft.testing.tolerance import assert_exact

CONFIG = ft.PTQ4(group_size=16, activations="int8", targets=["0", "2"])
N, K = 24, 40


def pair(kind: str) -> tuple[ft.nn.Int4Linear, ft.nn.Int4Linear]:
    """A layer that rounds its activations, and the same without."""
    config = ft.PTQ4(group_size=16, method="hqq" if kind == "float zeros" else "rtn")
    base = nn.Linear(K, N)
    weight = quantize_weight(base.weight, config)
    if kind == "permuted":
        order = torch.randperm(K, dtype=torch.int32)
        fields = {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "k": K}
        weight = QTensor4(**fields, group_size=16, perm=order)
    bias = None if kind == "no bias" else base.bias
    return (
        ft.nn.Int4Linear(weight, bias, activations="int8"),
        ft.nn.Int4Linear(weight, None if bias is None else copy.deepcopy(bias)),
    )


def model_of(config: ft.PTQ4 = CONFIG, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 7, bias=False))
    ft.quantize(model, config)
    return model.eval()


def by_the_op(layer: ft.nn.Int4Linear, x: torch.Tensor) -> torch.Tensor:
    weight = {"zero": layer.zeros, "perm": layer.perm, "group_size": layer.group_size}
    return functional.int4_linear_a8(x, layer.codes, layer.scales, bias=layer.bias, **weight)


@pytest.mark.parametrize("kind", ["plain", "no bias", "float zeros", "permuted"])
def test_it_rounds_x_always_and_has_the_gradient_of_the_layer_that_does_not(kind: str) -> None:
    layer, plain = pair(kind)
    x = torch.randn(2, 5, K)
    y = by_the_op(layer, x).detach()
    exact = plain(x).detach()
    assert 0 < float((y - exact).abs().max()) < 0.02 * float(exact.abs().max())
    for training in (True, False):
        layer.train(training)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                assert_exact(layer(x).detach(), y, f"{training} {mode.__name__}")
    grad = torch.randn_like(y)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for each, leaf in zip((layer, plain), inputs, strict=True):
        each(leaf).backward(grad)
    assert_exact(inputs[0].grad, inputs[1].grad, "dx")
    if layer.bias is not None:
        assert_exact(layer.bias.grad, plain.bias.grad, "db")
    assert "activations=int8" in repr(layer)
    assert "activations" not in repr(plain)


def test_it_survives_copies_casts_and_files(tmp_path: Path) -> None:
    model, x = model_of(), torch.randn(3, K)
    y, state = model(x), model.state_dict()
    assert [model[i].activations for i in (0, 2)] == ["int8", "int8"]
    assert_exact(y, by_the_op(model[2], by_the_op(model[0], x).tanh()), "by the op")
    assert_exact(copy.deepcopy(model)(x), y, "of a copy")
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype is torch.bfloat16
    assert half.double()(x.double()).dtype is torch.float64
    assert half[0].activations == "int8"
    torch.save(model, tmp_path / "whole.pt")
    assert_exact(torch.load(tmp_path / "whole.pt", weights_only=False)(x), y, "of a pickle")
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    for loaded in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        load_file(tmp_path / "state.safetensors"),
    ):
        for assign in (False, True):
            other = model_of(seed=1)
            assert not torch.equal(other(x), y)
            other.load_state_dict(loaded, assign=assign)
            assert_exact(other(x), y, "of a file")
    # The weights alone, into layers that do not round.
    plain = model_of(ft.PTQ4(group_size=16, targets=["0", "2"]), seed=1)
    plain.load_state_dict(state)
    assert plain[0].activations is None
    difference = (plain(x) - y).detach().abs().max()
    assert 0 < float(difference) < 0.05 * float(y.detach().abs().max())


def test_it_compiles_whole_and_under_autocast() -> None:
    model = model_of()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        inputs = [torch.full((rows, K), 0.1 * rows, requires_grad=True) for _ in range(2)]
        outputs = [m(x) for m, x in zip((model, compiled), inputs, strict=True)]
        assert float((outputs[0] - outputs[1]).abs().max()) < 1e-6
        for output in outputs:
            output.square().sum().backward()
        assert float((inputs[0].grad - inputs[1].grad).abs().max()) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(3, K)).dtype is torch.bfloat16


def test_json_carries_the_config() -> None:
    again = ft.PTQ4.from_dict(json.loads(json.dumps(CONFIG.to_dict())))
    assert again == CONFIG
    assert again.activations == "int8"
    assert ft.PTQ4().activations is None
    with pytest.raises(ValueError, match=r"^activations: expected None or 'int8', got 'int4'"):
        ft.PTQ4(activations="int4")
    with pytest.raises(ValueError, match=r"^activations: expected None but beside codebook='int4'"):
        ft.PTQ4(activations="int8", codebook="nf4")


def test_what_cannot_round_is_left_alone_or_refused() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 1), nn.Linear(5, 3), nn.Linear((1 << 20) + 1, 1))
    config = ft.PTQ4(group_size=-1, activations="int8", grid=1, targets=["0", "1", "2"])
    report = ft.quantize(model, config)
    assert report.changed == ("1",)
    assert report.skipped["0"] == "a convolution's activations are not rounded"
    assert "has no sum in 32 bits" in report.skipped["2"]
    assert type(model[0]) is nn.Conv1d

    nf4 = quantize_weight(torch.randn(N, K), ft.PTQ4(codebook="nf4"))
    with pytest.raises(ValueError, match="beside codes of int4, not of nf4"):
        ft.nn.Int4Linear(nf4, activations="int8")
    integer = quantize_weight(torch.randn(N, K), ft.PTQ4())
    with pytest.raises(ValueError, match="expected activations of None or 'int8', got 'int4'"):
        ft.nn.Int4Linear(integer, activations="int4")

    model = model_of()
    with pytest.raises(ValueError, match="its activations are rounded to int8, which adapters"):
        ft.convert(model, ft.LoRA(r=2, targets=["0"]))
    with pytest.raises(AttributeError):
        model[0].activations = None


def test_the_ways_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 7, bias=False)).eval()
    x = torch.randn(3, K)
    y = model(x)
    ft.quantize(model, CONFIG, keep_original="cpu")
    dense = copy.deepcopy(model)
    ft.dequantize(dense)
    assert type(dense[0]) is nn.Linear
    assert_exact(dense[0].weight, model[0].weight, "W")
    ft.revert(model)
    assert_exact(model(x), y, "the output")


def test_checkpoints_state_it(tmp_path: Path) -> None:
    model, x = model_of(), torch.randn(3, K)
    layers = {name: Layer(weight) for name, weight in weights(model).items()}
    rest = {"0.bias": model[0].bias.detach()}
    config = {"quant_method": "pyfastft", **CONFIG.to_dict()}
    ft.save_checkpoint(ft.Checkpoint("pyfastft", layers, rest, config), tmp_path / "stated")
    ft.save_checkpoint(ft.Checkpoint("pyfastft", layers, rest), tmp_path / "not")

    def loaded(folder: str, **options: str) -> nn.Module:
        plain = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 7, bias=False)).eval()
        ft.load_quantized(plain, tmp_path / folder, **options)
        return plain

    assert_exact(loaded("stated")(x), model(x), "as the file says")
    assert_exact(loaded("not", activations="int8")(x), model(x), "as asked for")
    assert loaded("not")[0].activations is None
    with pytest.raises(ValueError, match="expected None or 'int8', got 'int4'"):
        loaded("not", activations="int4")
    nf4 = Layer(quantize_weight(torch.randn(N, K), ft.PTQ4(codebook="nf4")))
    ft.save_checkpoint(ft.Checkpoint("pyfastft", {"0": nf4}), tmp_path / "nf4")
    model = nn.Sequential(nn.Linear(K, N))
    with pytest.raises(ValueError, match="0: expected a layer whose activations can be rounded"):
        ft.load_quantized(model, tmp_path / "nf4", activations="int8")
    assert type(model[0]) is nn.Linear


def test_through_transformers(tmp_path: Path) -> None:
    from pyfastft.quantization.hf import PTQ4Config

    shape = GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "dense")
    config = PTQ4Config(group_size=8, activations="int8")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "dense", quantization_config=config)
    tokens = torch.arange(10).view(2, 5)
    assert model.transformer.h[0].attn.c_attn.activations == "int8"
    y = model.eval()(tokens).logits
    model.save_pretrained(tmp_path / "saved")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "saved").eval()
    assert again.transformer.h[0].attn.c_attn.activations == "int8"
    assert_exact(again(tokens).logits, y, "of the folder")
    plain = GPT2LMHeadModel(shape).eval()
    ft.load_quantized(plain, tmp_path / "saved")
    assert plain.transformer.h[0].attn.c_attn.activations == "int8"
    assert_exact(plain(tokens).logits, y, "by our own loader")
