"""ft.quantize on whole models: what it changes and leaves alone, the way back, adapters on top, and
files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import pyfastft as ft
from pyfastft.formats._words import Layer
from pyfastft.quantization import QTensor4
from pyfastft.quantization.model import weights
from pyfastft.testing.tolerance import assert_exact


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.v_proj(self.q_proj(x).tanh())


class Model(nn.Module):
    def __init__(self, width: int = 32, layers: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TOKENS = torch.arange(10).view(2, 5)
CONFIG = ft.PTQ4(group_size=16, targets=["q_proj", "v_proj"])
PROJECTIONS = tuple(f"layers.{i}.{n}_proj" for i in range(3) for n in "qv")


def dense_of(weight: nn.Parameter, config: ft.PTQ4) -> torch.Tensor:
    from pyfastft.quantization import quantize_weight

    matrix = weight.detach().flatten(1)
    return quantize_weight(matrix, config).dequantize(weight.dtype).view(weight.shape)


def test_quantize_and_revert(tmp_path: Path) -> None:
    for keep in ("cpu", tmp_path / "kept" / "weights.safetensors"):
        model = Model().eval()
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        before, y = copy.deepcopy(model.state_dict()), model(TOKENS)
        report = ft.quantize(model, CONFIG, keep_original=keep)
        assert report.action == "quantize"
        assert report.changed == PROJECTIONS
        assert not report.skipped
        assert isinstance(model.layers[0].q_proj, ft.nn.Int4Linear)
        assert model.layers[0].q_proj.bias is parameters["layers.0.q_proj.bias"]
        for name in PROJECTIONS:
            expected = dense_of(nn.Parameter(before[f"{name}.weight"]), CONFIG)
            assert_exact(model.get_submodule(name).weight, expected, name)
        z = model(TOKENS)
        assert 0 < float((z - y).abs().max()) < 0.1 * float(y.abs().max())
        with pytest.raises(ValueError, match="quantize: the model was quantized already"):
            ft.quantize(model, CONFIG)
        if keep != "cpu":
            assert modules["layers.0.q_proj"].weight.numel() == 0
            with pytest.raises(FileExistsError, match="expected no such file"):
                ft.quantize(Model(), CONFIG, keep_original=keep)
        assert ft.revert(model).changed == PROJECTIONS
        assert dict(model.named_modules()) == modules
        assert all(p is parameters[name] for name, p in model.named_parameters())
        for name, value in model.state_dict().items():
            assert_exact(value, before[name], name)
        assert_exact(model(TOKENS), y, "the output")


def test_what_was_given_up_is_not_reverted(tmp_path: Path) -> None:
    model = Model()
    ft.quantize(model, CONFIG)
    with pytest.raises(ValueError, match=r"revert: the original weights were given up; "):
        ft.revert(model)
    model = Model()
    ft.quantize(model, CONFIG, keep_original=tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"w\.safetensors: expected a safetensors file"):
        ft.revert(model)
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        ft.revert(model)
    assert isinstance(model.layers[0].q_proj, ft.nn.Int4Linear)


def test_targets_follow_the_rules_of_convert() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"quantize: .*'q_prj'; did you mean 'q_proj'"):
        ft.quantize(model, ft.PTQ4(targets=["q_prj"]))
    with pytest.raises(ValueError, match="quantize: expected targets of modules that can be"):
        ft.quantize(model, ft.PTQ4(targets=["embed"]))
    report = ft.quantize(
        model, ft.PTQ4(targets=["q_proj", "embed"], layers=[1], layers_pattern="layers")
    )
    assert report.changed == ("layers.1.q_proj",)
    assert report.skipped["layers.0.q_proj"] == "not in layers (1,)"
    embedded = ft.quantize(Model(), ft.PTQ4(targets=["q_proj", "embed"]))
    assert embedded.skipped == {"embed": "Embedding is no linear layer or convolution"}
    everything = Model()
    assert len(ft.quantize(everything, ft.PTQ4(exclude=["head"])).changed) == 6
    with pytest.raises(TypeError, match="expected config of type PTQ4, got LoRA"):
        ft.quantize(model, ft.LoRA())


def test_a_weight_that_is_not_finite_changes_nothing() -> None:
    model = Model()
    model.layers[2].v_proj.weight.data[3, 4] = torch.nan
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"quantize: layers\.2\.v_proj: .*finite"):
        ft.quantize(model, CONFIG, keep_original="cpu")
    assert dict(model.named_modules()) == modules


def test_tied_and_shared_weights() -> None:
    model = Model(tied=True)
    report = ft.quantize(model, ft.PTQ4(group_size=16))
    assert report.changed == PROJECTIONS
    assert report.skipped == {"head": "its weight is embed.weight too"}
    assert model.head.weight is model.embed.weight
    with pytest.raises(ValueError, match=r"got none \(head: its weight is embed.weight too\)"):
        ft.quantize(Model(tied=True), ft.PTQ4(targets=["head"]))

    model = Model()
    model.layers[1].q_proj = model.layers[0].q_proj  # one module in two places
    model.layers[2].q_proj.weight = model.layers[0].q_proj.weight  # one weight in two modules
    y = model(TOKENS)
    report = ft.quantize(model, CONFIG, keep_original="cpu")
    assert model.layers[1].q_proj is model.layers[0].q_proj
    assert model.layers[2].q_proj is not model.layers[0].q_proj
    assert model.layers[2].q_proj.codes is model.layers[0].q_proj.codes
    ft.revert(model)
    assert model.layers[1].q_proj is model.layers[0].q_proj
    assert model.layers[2].q_proj.weight is model.layers[0].q_proj.weight
    assert_exact(model(TOKENS), y, "the output")


def test_gpt2() -> None:
    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.arange(10).view(2, 5)
    y = model(tokens).logits
    original = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    report = ft.quantize(model, ft.PTQ4(group_size=8), keep_original="cpu")
    assert report.counts == {"c_attn": 2, "c_proj": 4, "c_fc": 2}
    assert "output head" in report.skipped["lm_head"]
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight.shape == (48, 16)
    assert_exact(layer.weight, dense_of(nn.Parameter(original.T), CONFIG_8), "W")
    assert float((model(tokens).logits - y).abs().max()) < 0.1 * float(y.abs().max())
    ft.revert(model)
    assert_exact(model(tokens).logits, y, "the output")


CONFIG_8 = ft.PTQ4(group_size=8)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(dimensions: int, groups: int) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    options = {"stride": 2, "padding": 1, "groups": groups, "padding_mode": "reflect"}
    model = nn.Sequential(kind(4, 6, 3, **options), nn.ReLU(), kind(6, 4, 1, bias=False)).eval()
    x = torch.randn(2, 4, *[7] * dimensions)
    y = model(x)
    config = ft.PTQ4(group_size=6, targets=["0", "2"])
    expected = copy.deepcopy(model)
    for at in (0, 2):
        expected[at].weight.data = dense_of(model[at].weight, config)
    ft.quantize(model, config, keep_original="cpu")
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(i) for m, i in zip((model, expected), inputs, strict=True)]
    # A kernel of 1 is a linear layer in 4 bits: the same sums in another order.
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)

    if groups == 1:
        torch.manual_seed(1)
        ft.convert(model, ft.LoRA(r=2, targets=["0", "2"], init="random"))
        torch.manual_seed(1)
        ft.convert(expected, ft.LoRA(r=2, targets=["0", "2"], init="random"))
        torch.testing.assert_close(model(x), expected(x))
        ft.revert(model)
    ft.revert(model)
    assert_exact(model(x), y, "the output")


def test_adapters_on_top() -> None:
    model = Model().eval()
    ft.quantize(model, CONFIG, keep_original="cpu")
    expected = copy.deepcopy(model)
    ft.dequantize(expected)
    assert type(expected.layers[0].q_proj) is nn.Linear
    z = model(TOKENS)
    for each in (model, expected):
        torch.manual_seed(5)
        ft.convert(each, ft.LoRA(r=4, init="random", targets=["q_proj", "v_proj"]))
    assert isinstance(model.layers[0].q_proj, ft.nn.LoRAInt4Linear)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == {f"{name}.lora_{m}" for name in PROJECTIONS for m in "ab"}
    for each in (model, expected):
        each(TOKENS).square().mean().backward()
    assert float((model(TOKENS) - expected(TOKENS)).abs().max()) < 1e-5
    for name, ours in model.named_parameters():
        if "lora" in name:
            assert float((ours.grad - expected.get_parameter(name).grad).abs().max()) < 1e-5
    with pytest.raises(ValueError, match=r"merge: layers\.0\.q_proj: its weight is in 4 bits"):
        ft.merge(model)
    with pytest.raises(ValueError, match="quantize: the model has adapters already"):
        ft.quantize(model, CONFIG)
    before = model(TOKENS)
    dense = copy.deepcopy(model)
    assert ft.dequantize(dense).changed == PROJECTIONS
    ft.merge(dense)
    assert float((dense(TOKENS) - before).abs().max()) < 1e-5
    ft.revert(model)
    assert_exact(model(TOKENS), z, "without adapters")
    ft.revert(model)
    assert type(model.layers[0].q_proj) is nn.Linear


def test_adapters_save_and_load_on_top(tmp_path: Path) -> None:
    model = Model().eval()
    ft.quantize(model, CONFIG)
    base = copy.deepcopy(model)
    ft.convert(model, ft.LoRA(r=4, init="random", targets=["q_proj"]))
    ft.save_adapter(model, tmp_path / "adapter")
    ft.load_adapter(base, tmp_path / "adapter")
    assert_exact(base(TOKENS), model(TOKENS), "the output")


def test_dequantize_needs_something_to_do() -> None:
    with pytest.raises(ValueError, match="dequantize: expected a model with 4-bit layers"):
        ft.dequantize(Model())


def test_hooks_stay() -> None:
    model = Model().eval()
    calls = []
    handle = model.layers[0].q_proj.register_forward_hook(lambda *_: calls.append(1))
    ft.quantize(model, CONFIG)
    model(TOKENS)
    assert calls == [1]
    handle.remove()
    model(TOKENS)
    assert calls == [1]


FORMATS = {
    "pyfastft": ft.PTQ4(group_size=16),
    "gptq": ft.PTQ4(group_size=16, scale_dtype="float16"),
    "awq": ft.PTQ4(method="hqq", round_zero=True, group_size=16, scale_dtype="float16"),
    "compressed-tensors": ft.PTQ4(group_size=16, symmetric=True, scale_dtype="bfloat16"),
    "bitsandbytes": ft.PTQ4(group_size=16, codebook="nf4"),
}
OPTIONS = {"gptq": {"checkpoint_format": "gptq_v2"}}


@pytest.mark.parametrize("format", FORMATS)
def test_checkpoints(format: str, tmp_path: Path) -> None:
    model = Model().eval()
    base = copy.deepcopy(model)
    ft.quantize(model, FORMATS[format], keep_original="cpu")
    names = [*PROJECTIONS, "head"]
    if format in ("gptq", "awq"):  # 11 outputs are no multiple of 8
        ft.revert(model)
        ft.quantize(model, ft.PTQ4(**{**FORMATS[format].to_dict(), "exclude": ["head"]}))
        names.remove("head")
    held = weights(model)
    assert set(held) == set(names)
    options = OPTIONS.get(format, {})
    layers = {name: Layer(weight, options) for name, weight in held.items()}
    quantized = tuple(f"{name}." for name in names)
    rest = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(quantized) or name.endswith("bias")
    }
    folder = tmp_path / "model"
    ft.save_checkpoint(ft.Checkpoint(format, layers, rest), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "quantize_config.json"]
    assert json.loads((folder / "quantize_config.json").read_text())["quant_method"] == format

    counts = ft.verify(held, folder)
    assert counts["layers"] == len(names)
    assert counts["codes"] == sum(w.n * w.k for w in held.values())
    again = ft.load_checkpoint(folder)
    assert again.format == format
    assert set(again.rest) == set(rest)
    ft.save_checkpoint(again, tmp_path / "again")
    first, second = ((f / "model.safetensors").read_bytes() for f in (folder, tmp_path / "again"))
    assert first == second

    report = ft.load_quantized(base, folder)
    assert set(report.changed) == set(names)
    assert_exact(base(TOKENS), model(TOKENS), "the output")

    wrong = dict(held)
    name = names[0]
    codes = wrong[name].codes.clone()
    codes[3, 5] ^= 0x10
    wrong[name] = QTensor4(
        codes=codes,
        scale=wrong[name].scale,
        zero=wrong[name].zero,
        k=wrong[name].k,
        group_size=wrong[name].group_size,
        codebook=wrong[name].codebook,
    )
    with pytest.raises(ValueError, match=rf"{name}: codes differs in 1 bytes"):
        ft.verify(wrong, folder)
    del wrong[name]
    with pytest.raises(ValueError, match=f"expected the same layers, {name} is in one only"):
        ft.verify(wrong, folder)


def test_loading_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model = Model()
    ft.quantize(model, CONFIG)
    layers = {name: Layer(weight) for name, weight in weights(model).items()}
    ft.save_checkpoint(ft.Checkpoint("pyfastft", layers, {"other": torch.ones(1)}), tmp_path)
    for other, message in (
        (Model(), "expected tensors of the model's, got other"),
        (Model(width=16), r"layers.0.q_proj: expected a weight of shape \(16, 16\)"),
        (Model(layers=2), "expected layers of the model's, got layers.2"),
    ):
        modules = dict(other.named_modules())
        with pytest.raises(ValueError, match=message):
            ft.load_quantized(other, tmp_path)
        assert dict(other.named_modules()) == modules


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    import os

    model = Model()
    ft.quantize(model, CONFIG)
    layers = {name: Layer(weight) for name, weight in weights(model).items()}
    ft.save_checkpoint(ft.Checkpoint("pyfastft", layers), tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="no space left"):
            ft.save_checkpoint(ft.Checkpoint("pyfastft", layers), tmp_path / folder)
    with pytest.raises(OSError, match="no space left"):
        ft.quantize(Model(), CONFIG, keep_original=tmp_path / "w.safetensors")
    assert os.listdir(tmp_path) == ["old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before
