"""Convolutions and embeddings as the layers they stand in for, and models of them, beside PEFT."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel

import pyfastft as ft
from pyfastft.testing.tolerance import assert_accurate, assert_exact

BASES = {
    "conv1d": (ft.nn.LoRAConv1d, lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (ft.nn.LoRAConv2d, lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 9, 8)),
    "circular": (
        ft.nn.LoRAConv2d,
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
        (2, 4, 7, 6),
    ),
    "pointwise": (ft.nn.LoRAConv2d, lambda: nn.Conv2d(4, 6, 1), (2, 4, 7, 6)),
    "groups": (ft.nn.LoRAConv2d, lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 6)),
    "conv3d": (ft.nn.LoRAConv3d, lambda: nn.Conv3d(4, 6, 2), (2, 4, 5, 4, 3)),
    "embedding": (ft.nn.LoRAEmbedding, lambda: nn.Embedding(9, 6, padding_idx=2), None),
}
MERGEABLE = [name for name in BASES if name != "groups"]


def make(name: str, dtype: torch.dtype = torch.float32, **options):
    """The layer and an input of it."""
    kind, base, shape = BASES[name]
    options = {"r": 2, "scale": 1.5, "init": "random", **options}
    x = torch.randint(9, (3, 5)) if shape is None else torch.randn(shape, dtype=dtype)
    return kind(base().to(dtype), **options), x


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "lora_bias"),
    [*((name, False) for name in MERGEABLE), ("conv1d", True), ("pointwise", True)],
)
def test_merging_computes_the_same_and_is_undone(name, lora_bias, dtype) -> None:
    layer, x = make(name, dtype, lora_bias=lora_bias)
    layer.eval()
    state, y = copy.deepcopy(layer.state_dict()), layer(x)
    merged = copy.deepcopy(layer)
    merged.merge(safe=True)
    truth = copy.deepcopy(layer).double()
    truth.merge()
    truth, naive = truth(wide(x)).detach(), merged(x).detach()
    assert_accurate(y.detach(), truth, naive)
    merged.unmerge()
    for key, value in merged.state_dict().items():
        assert_exact(value, state[key], key)
    assert_exact(merged(x), y, "the output")


@pytest.mark.parametrize("name", BASES)
def test_the_base_comes_back(name: str) -> None:
    layer, x = make(name)
    base = layer.base
    parameters = dict(base.named_parameters())
    names = [n for n, _ in base.named_parameters()]
    assert list(layer.state_dict()) == [*names, "lora_a", "lora_b"]
    layer.enabled = False
    assert_exact(layer(x), base(x), "the output without adapter")
    layer.take_over()
    assert layer.restore() is base
    assert dict(base.named_parameters()) == parameters
    assert ("bias" in base._parameters) == (name != "embedding")


@pytest.mark.parametrize("name", BASES)
def test_copies_files_and_starts(name: str) -> None:
    layer, x = make(name)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert twin.base.weight is twin.weight is not layer.weight
    for copied in (twin, pickle.loads(pickle.dumps(layer))):
        assert_exact(copied(x), y, "a copy's output")
    fresh, _ = make(name, init="kaiming")
    assert_exact(fresh(x), fresh.base(x), "the output at the start")
    fresh.load_state_dict(layer.state_dict())
    assert_exact(fresh(x), y, "the loaded output")
    assert repr(layer).startswith(f"{type(layer).__name__}({layer.base.extra_repr()}, r=2, ")


@pytest.mark.parametrize("name", ["conv2d", "pointwise", "groups", "embedding"])
def test_autocast_keeps_the_gradients_dtypes(name: str) -> None:
    layer, x = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        y, base = layer(x), layer.base(x)
    assert y.dtype is base.dtype
    truth = copy.deepcopy(layer).double()(wide(x)).detach()
    low = copy.deepcopy(layer).bfloat16()
    naive = low(x.bfloat16() if x.is_floating_point() else x).detach()
    assert_accurate(y.detach().to(naive.dtype), truth, naive)
    y.sum().backward()
    assert layer.lora_a.grad.dtype is torch.float32


def test_what_cannot_be() -> None:
    layer, _ = make("groups")
    with pytest.raises(ValueError, match=r"groups = 2.* cannot be merged"):
        layer.merge()
    assert not layer.merged
    with pytest.raises(ValueError, match="expected r of a multiple of groups = 2, got 3"):
        make("groups", r=3)
    with pytest.raises(ValueError, match="lora_bias of False"):
        make("embedding", lora_bias=True)
    with pytest.raises(TypeError, match=r"expected base of type nn\.Conv1d, Conv2d is no nn\."):
        ft.nn.LoRAConv1d(nn.Conv2d(1, 1, 1), r=1, scale=1.0)
    with pytest.raises(TypeError, match=r"ConvTranspose1d is no nn\.Conv1d"):
        ft.nn.LoRAConv1d(nn.ConvTranspose1d(1, 1, 1), r=1, scale=1.0)


@pytest.mark.more
@pytest.mark.parametrize("name", ["conv1d", "pointwise", "embedding"])
def test_compiles_whole_and_not_again_for_a_new_scale(name: str) -> None:
    layer, x = make(name, dropout=0.1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for scale in (1.0, 2.0, 3.0):
        layer.scale = scale
        compiled(x).sum().backward()
    assert counter.frame_count == 1


class Net(nn.Module):
    """An embedding, convolutions of one to three dimensions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6, padding_idx=0)
        self.one = nn.Conv1d(6, 8, 3, padding=1)
        self.two = nn.Conv2d(1, 4, 3, stride=2, padding=1, groups=1)
        self.split = nn.Conv2d(4, 4, 1, groups=2)
        self.three = nn.Conv3d(1, 2, 2)
        self.out = nn.Linear(2, 3)

    def forward(self, x):
        x = self.one(self.emb(x).transpose(1, 2)).tanh()
        x = self.split(self.two(x[:, None])).tanh()
        x = self.three(x[:, None]).flatten(2).mean(2)
        return self.out(x)


NAMES = ["emb", "one", "two", "split", "three", "out"]
TOKENS = torch.arange(21).remainder(9).view(3, 7)


def assert_same(y: torch.Tensor, theirs: nn.Module) -> None:
    truth = copy.deepcopy(theirs).double()(TOKENS)
    assert_accurate(y.detach(), truth.detach(), theirs(TOKENS).detach())


def test_a_model_trains_as_pefts_and_its_files_are_pefts(tmp_path: Path) -> None:
    base = Net().eval()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    assert list(ft.load_adapter(model, tmp_path / "theirs").changed) == NAMES
    assert_same(model(TOKENS), theirs)
    outputs = model(TOKENS), theirs(TOKENS), (truth := copy.deepcopy(theirs).double())(TOKENS)
    for y in outputs:
        y.square().sum().backward()
    for name in NAMES:
        layer = model.get_submodule(name)
        for suffix, parameter in layer.adapter().items():
            side, _, _ = suffix.partition(".")
            naive, true = (m.base_model.model.get_submodule(name) for m in (theirs, truth))
            grads = [getattr(m, side)["default"] for m in (true, naive)]
            grads = [g.grad if isinstance(g, nn.Parameter) else g.weight.grad for g in grads]
            assert_accurate(parameter.grad, *grads, gradient=True, what=f"{name}.{suffix}")
    ft.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert_same(model(TOKENS), again)
    ft.revert(model)
    assert_exact(model(TOKENS), base(TOKENS), "the output after the way back")


def test_a_rank_that_does_not_fit_a_layer_changes_nothing() -> None:
    model = Net()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"convert: split: .*expected r of a multiple of groups"):
        ft.convert(model, ft.LoRA(r=3, targets=NAMES))
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


def test_merging_a_model_with_groups_is_refused_whole() -> None:
    model = Net()
    ft.convert(model, ft.LoRA(r=2, targets=NAMES, init="random"))
    with pytest.raises(ValueError, match=r"merge: split: .*groups = 2"):
        ft.merge(model)
    assert not any(model.get_submodule(name).merged for name in NAMES)


def test_tables_that_peft_saves_beside_their_adapters(tmp_path: Path) -> None:
    """Where an embedding is a target by a known name, PEFT saves the table, too."""
    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    base = GPT2LMHeadModel(config).eval()
    options = {"r": 2, "target_modules": ["wte", "c_attn"], "init_lora_weights": False}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    tokens = torch.arange(10).view(2, 5)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = copy.deepcopy(base)
    ft.load_adapter(model, tmp_path)
    truth = copy.deepcopy(theirs).double()(tokens).logits
    naive = theirs(tokens).logits
    assert_accurate(model(tokens).logits.detach(), truth.detach(), naive.detach())
