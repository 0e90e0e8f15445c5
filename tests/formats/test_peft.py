"""Adapters in PEFT's files: PEFT reads ours, we read PEFT's, and nothing hostile gets through."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import struct
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import pyfastft as ft
from pyfastft.formats.peft import config_from_peft
from pyfastft.testing.tolerance import assert_accurate, assert_exact


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 6), "norm": nn.LayerNorm(6)})
            for _ in range(2)
        )
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer["norm"](x + layer["k"](layer["q"](x).tanh()))
        return self.out(x)


X = torch.linspace(-1, 1, 24).view(4, 6)
CONFIGS = {
    "plain": {"target_modules": ["q", "out"]},
    "regex": {"target_modules": r"layers\.\d\.(q|k)", "lora_alpha": 3},
    "all-linear": {"target_modules": "all-linear"},
    "excludes": {"target_modules": ["q", "k"], "exclude_modules": ["layers.0.q"]},
    "layers": {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "patterns": {
        "target_modules": ["q", "k"],
        "rank_pattern": {"q": 2, r"layers\.1\.k": 5},
        "alpha_pattern": {"layers.1.q": 7, "k": 2.5},
    },
    "rslora": {"target_modules": ["k"], "use_rslora": True, "rank_pattern": {"layers.0.k": 4}},
    "all biases": {"target_modules": ["q"], "bias": "all"},
    "lora biases": {"target_modules": ["q"], "bias": "lora_only"},
    "lora bias": {"target_modules": ["q"], "lora_bias": True},
    "both biases": {"target_modules": ["q"], "lora_bias": True, "bias": "all"},
    "dropout": {"target_modules": ["q"], "lora_dropout": 0.2},
}


def ours_of(options: dict) -> ft.LoRA:
    return config_from_peft({"peft_type": "LORA", "r": 3, **options, "init_lora_weights": False})


def perturb(model: nn.Module) -> None:
    """As if trained: everything that trains is moved off its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def assert_same(ours: torch.Tensor, theirs: nn.Module, *inputs: torch.Tensor) -> None:
    truth = copy.deepcopy(theirs).double()
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    outputs = (truth(*wide), theirs(*inputs))
    truth, naive = (y if isinstance(y, torch.Tensor) else y.logits for y in outputs)
    assert_accurate(ours.detach(), truth.detach(), naive.detach())


@pytest.mark.parametrize("name", CONFIGS)
def test_we_read_pefts(name: str, tmp_path: Path) -> None:
    base = Net().eval()
    config = peft.LoraConfig(r=3, init_lora_weights=False, **CONFIGS[name])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    report = ft.load_adapter(model, tmp_path)
    assert list(report.changed) == theirs.base_model.targeted_module_names
    assert_same(model(X), theirs, X)
    # A model that has these layers already takes the values too.
    again = copy.deepcopy(base)
    ft.convert(again, ours_of(CONFIGS[name]))
    perturb(again)
    before = {n: p.clone() for n, p in again.named_parameters()}
    ft.load_adapter(again, tmp_path)
    assert any(not torch.equal(p, before[n]) for n, p in again.named_parameters())
    assert_exact(again(X), model(X), "the output")


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_reads_ours(name: str, tmp_path: Path) -> None:
    base = Net().eval()
    model = copy.deepcopy(base)
    report = ft.convert(model, ours_of(CONFIGS[name]))
    perturb(model)
    ft.save_adapter(model, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path)) == ["adapter"]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    assert theirs.base_model.targeted_module_names == list(report.changed)
    assert_same(model(X), theirs, X)
    again = copy.deepcopy(base)
    ft.load_adapter(again, tmp_path / "adapter")
    assert_exact(again(X), model(X), "the output of our own file")
    # The same tensors under the same names as PEFT writes.
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "theirs")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        assert_exact(value, files[1][key], key)


def test_conv1d(tmp_path: Path) -> None:
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    ).eval()
    tokens = torch.arange(10).view(2, 5)
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ).eval()
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    ft.load_adapter(model, tmp_path / "theirs")
    assert_same(model(tokens).logits, theirs, tokens)
    ft.save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["fan_in_fan_out"]
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert_same(model(tokens).logits, again, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_dtype", ["float32", "base"])
def test_half_precision(dtype, adapter_dtype, tmp_path: Path) -> None:
    model = Net().to(dtype)
    base = copy.deepcopy(model)
    ft.convert(model, ft.LoRA(targets=["q"], adapter_dtype=adapter_dtype))
    perturb(model)
    ft.save_adapter(model, tmp_path)
    wide = torch.float32 if adapter_dtype == "float32" else dtype
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {wide}
    ft.load_adapter(base, tmp_path)
    assert base.layers[0]["q"].lora_a.dtype is torch.float32
    assert_exact(base.layers[0]["q"].lora_a.to(wide), model.layers[0]["q"].lora_a, "A")


def test_a_scale_that_was_set_is_saved(tmp_path: Path) -> None:
    base = Net().eval()
    model = copy.deepcopy(base)
    ft.convert(model, ft.LoRA(r=3, targets=["q", "out"], init="random"))
    model.layers[1]["q"].scale = 0.25
    ft.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert_same(model(X), theirs, X)
    ft.load_adapter(base, tmp_path)
    assert base.layers[1]["q"].scale == 0.25
    assert_exact(base(X), model(X), "the output")


def test_names_that_end_like_others_and_skipped_layers(tmp_path: Path) -> None:
    """PEFT's rules would also take ``body.lin`` and the norm for the saved names."""
    base = nn.ModuleDict({"lin": nn.Linear(4, 4), "body": nn.Module(), "norm": nn.LayerNorm(4)})
    base["body"].lin = nn.Linear(4, 4)
    model = copy.deepcopy(base)
    ft.convert(model, ft.LoRA(targets=["lin", "norm"], exclude=["body.lin"], init="random"))
    ft.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == "lin"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert theirs.base_model.targeted_module_names == ["lin"]
    assert ft.load_adapter(base, tmp_path).changed == ("lin",)


def test_saving_over_an_adapter_keeps_other_files(tmp_path: Path) -> None:
    model = Net().eval()
    ft.convert(model, ft.LoRA(targets=["q"], init="random"))
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        perturb(model)
        ft.save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]
    other = Net().eval()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    ft.load_adapter(other, tmp_path)
    assert_exact(other(X), model(X), "the output")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    ft.convert(model, ft.LoRA(targets=["q"]))
    ft.save_adapter(model, tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    perturb(model)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="no space left"):
            ft.save_adapter(model, tmp_path / folder)
    assert os.listdir(tmp_path) == ["old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before
    with pytest.raises(NotADirectoryError):
        ft.save_adapter(model, tmp_path / "old" / "adapter_config.json")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = Net()
    with pytest.raises(
        ValueError, match=r"save_adapter: expected a model that convert\(\) changed"
    ):
        ft.save_adapter(model, tmp_path / "new")
    ft.convert(model, ft.LoRA(targets=["q"], bias="all"))
    ft.merge(model)
    with pytest.raises(ValueError, match="unmerge first"):
        ft.save_adapter(model, tmp_path / "new")
    assert not os.listdir(tmp_path)


# Every key of PEFT's LoraConfig: what it does here beside its default.
SUPPORTED = {
    "r": 4,
    "target_modules": "k",
    "exclude_modules": ["q"],
    "lora_alpha": 3,
    "lora_dropout": 0.5,
    "bias": "all",
    "use_rslora": True,
    "init_lora_weights": "gaussian",
    "layers_to_transform": [1],
    "layers_pattern": [],
    "rank_pattern": {"k": 2},
    "alpha_pattern": {"k": 2},
    "lora_bias": True,
}
INERT = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "auto_mapping": {"base_model_class": "M", "parent_library": "m"},
    "peft_version": "0.21.2",
    "base_model_name_or_path": "somewhere/else",
    "revision": "main",
    "inference_mode": True,
    "fan_in_fan_out": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 32,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "eva_config": {"rho": 2.0},
    "ensure_weight_tying": True,
}
REFUSED = {
    "modules_to_save": ["classifier"],
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1],
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "use_dora": True,
    "velora_config": {"num_groups": 4},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [[0, 2]],
    "target_parameters": ["experts.w"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
}
KEYS = [field.name for field in dataclasses.fields(peft.LoraConfig)]


def test_the_table_of_keys_is_whole() -> None:
    assert sorted([*SUPPORTED, *INERT, *REFUSED]) == sorted(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_pefts_config(key: str) -> None:
    default = json.loads(json.dumps(peft.LoraConfig(target_modules=["q"]).to_dict(), default=list))
    plain = config_from_peft(default)
    for nothing in (None, default.get(key)):
        if key not in ("target_modules", "peft_type") or nothing is not None:
            assert config_from_peft({**default, key: nothing}) == plain
    if key in REFUSED:
        with pytest.raises(ValueError, match=rf"^{key}: expected no value, it is not supported"):
            config_from_peft({**default, key: REFUSED[key]})
    elif key in INERT:
        assert config_from_peft({**default, key: INERT[key]}) == plain
    elif key != "layers_pattern":
        assert config_from_peft({**default, key: SUPPORTED[key]}) != plain


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        ({"target_modules": None}, "target_modules: expected names"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: .*alone.*got 'pissa'"),
        ({"init_lora_weights": "olora"}, "got 'olora'"),
        ({"init_lora_weights": []}, "init_lora_weights"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow: expected no value"),
        ({"r": "8"}, "r: expected an integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number"),
        ({"lora_dropout": 2}, "lora_dropout: expected a probability"),
        ({"target_modules": "("}, "target_modules: expected a regular expression"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\]"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform: expected an integer"),
    ],
)
def test_refused_configs(values: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        config_from_peft({"peft_type": "LORA", "target_modules": ["q"], **values})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = Net()
    ft.convert(model, ft.LoRA(r=3, targets=["q"], bias="lora_only", init="random"))
    ft.save_adapter(model, folder)
    return folder


A = "base_model.model.layers.0.q.lora_A.weight"
BIAS = "base_model.model.layers.1.q.base_layer.bias"


def replaced(key: str, value: torch.Tensor | None):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(A, torch.zeros(4, 6)), r"lora_A.weight of (rank 3|shape \(3, 6\)), got"),
        (replaced(A, torch.zeros(3, 7)), r"of shape \(3, 6\), got \(3, 7\)"),
        (replaced(A, torch.zeros(18)), r"of (rank 3|shape \(3, 6\)), got"),
        (replaced(A, torch.zeros(3, 6, dtype=torch.int32)), "of a float dtype, got int32"),
        (replaced(A, torch.full((3, 6), float("nan"))), "of finite float32 values"),
        (replaced(BIAS, torch.full((6,), float("inf"))), "of finite float32 values"),
        (replaced(A, torch.full((3, 6), 1e300, dtype=torch.float64)), "of finite float32"),
        (replaced(A, None), "a tensor for every layer, none for .*layers.0.q.lora_A"),
        (replaced(BIAS, None), "none for .*base_layer.bias"),
        (replaced("base_model.model.out.lora_A.weight", torch.zeros(3, 6)), "layers only, got"),
        (replaced("base_model.model.layers.0.q.lora_embedding_A", torch.zeros(3)), "only, got"),
    ],
)
@pytest.mark.parametrize("converted", [False, True])
def test_hostile_tensors_touch_nothing(change, message, converted, adapter, tmp_path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    model = Net()
    if converted:
        ft.convert(model, ft.LoRA(r=3, targets=["q"], bias="lora_only"))
    assert_untouched(model, tmp_path, message)


def assert_untouched(model: nn.Module, folder: Path, message: str) -> None:
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        ft.load_adapter(model, folder)
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    for name, value in model.state_dict().items():
        assert_exact(value, state[name], name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4, "targets": ["q"]}, "expected rank 4 of layers.0.q, got 3"),
        ({"r": 3, "targets": ["q", "k"]}, "differs in layers.0.k, layers.1.k"),
        ({"r": 3, "targets": ["q"], "bias": "all"}, "expected bias of 'all'"),
        ({"r": 3, "targets": ["q"], "bias": "lora_only", "lora_bias": True}, "lora_bias of True"),
    ],
)
def test_an_adapter_of_another_conversion(config, message, adapter) -> None:
    model = Net()
    ft.convert(model, ft.LoRA(**config))
    assert_untouched(model, adapter, message)


def test_loading_into_merged_or_foreign_layers(adapter) -> None:
    model = Net()
    ft.convert(model, ft.LoRA(r=3, targets=["q"], bias="lora_only"))
    ft.merge(model)
    assert_untouched(model, adapter, "is merged, unmerge first")
    other = Net()
    other.out = ft.nn.LoRALinear(other.out, r=2, scale=1.0)
    assert_untouched(other, adapter, r"has adapters already \(out\)")


def test_missing_and_damaged_files(adapter, tmp_path) -> None:
    model = Net()
    with pytest.raises(FileNotFoundError):
        ft.load_adapter(model, tmp_path)
    config = tmp_path / "adapter_config.json"
    weights = tmp_path / "adapter_model.safetensors"
    config.write_bytes((adapter / config.name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors: no such file"):
        ft.load_adapter(model, tmp_path)
    content = (adapter / weights.name).read_bytes()
    hostile = [b"", content[:7], content[:-1], content[:200], content + b"x"]
    hostile += [struct.pack("<Q", 2**62) + content[8:], struct.pack("<Q", 2) + b"{}"]
    for damaged in hostile:
        weights.write_bytes(damaged)
        assert_untouched(model, tmp_path, "adapter_model.safetensors: expected")
    weights.write_bytes(content)
    huge = b'{"target_modules": ["q"], "r": 1000000000000}'
    for damaged in (b"", b"{", b"[]", b"\xff\xfe", b'{"r": 3}', b"[" * 100_000, huge):
        config.write_bytes(damaged)
        assert_untouched(model, tmp_path, "adapter_")


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_fuzzed_files_load_whole_or_not_at_all(data, adapter, tmp_path) -> None:
    model = Net()
    state = copy.deepcopy(model.state_dict())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = bytearray((adapter / name).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            # Mostly the header: behind it any bits are numbers.
            at = data.draw(st.integers(0, min(len(content), 700) - 1))
            content[at] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()) and name.endswith("safetensors"):
            content = content[: data.draw(st.integers(0, len(content)))]
        (tmp_path / name).write_bytes(content)
    try:
        ft.load_adapter(model, tmp_path)
    except ValueError:
        assert not any(isinstance(m, ft.nn.LoRALinear) for m in model.modules())
        for name, value in model.state_dict().items():
            assert_exact(value, state[name], name)
    else:
        assert all(p.isfinite().all() for p in model.parameters())
