"""Another adapter's values in a model's layers: PEFT's files, smaller ranks, compiled models.

In float64, where nothing but the rules can differ from PEFT's.
"""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyfastft as ft
from pyfastft.testing.tolerance import assert_exact


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.up = nn.Linear(8, 6)
        self.down = nn.Linear(6, 3)

    def forward(self, x):
        return self.down(self.up(self.conv(self.emb(x).mT).mT).tanh())


TOKENS = torch.arange(20).remainder(9).view(4, 5)
NAMES = ["emb", "conv", "up", "down"]


def pefts(base: nn.Module, folder: Path, **options) -> nn.Module:
    """PEFT's model with an adapter drawn at random, its files in the folder."""
    config = peft.LoraConfig(**{"target_modules": NAMES, "init_lora_weights": False, **options})
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(0.5)
    model.save_pretrained(folder)
    return model


def assert_same(y: torch.Tensor, theirs: nn.Module) -> None:
    torch.testing.assert_close(y, theirs(TOKENS))


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 3},
        {"r": 2, "lora_alpha": 7, "use_rslora": True},
        {"r": 1, "rank_pattern": {"up": 4}, "alpha_pattern": {"conv": 5}},
    ],
    ids=str,
)
def test_another_adapter_takes_its_place(options: dict, tmp_path: Path) -> None:
    base = Net().double().eval()
    model = copy.deepcopy(base)
    ft.convert(model, ft.LoRA(r=4, targets=NAMES, init="random"))
    layers = dict(model.named_modules())
    pointers = [p.data_ptr() for p in model.parameters()]
    theirs = pefts(base, tmp_path / "new", **options)
    report = ft.hotswap_adapter(nn.Sequential(model), tmp_path / "new")
    assert list(report.changed) == NAMES
    assert_same(model(TOKENS), theirs)
    assert dict(model.named_modules()) == layers
    assert [p.data_ptr() for p in model.parameters()] == pointers
    # What is saved then is the adapter at the layers' ranks.
    ft.save_adapter(model, tmp_path / "saved")
    again = copy.deepcopy(base)
    ft.load_adapter(again, tmp_path / "saved")
    assert_exact(again(TOKENS), model(TOKENS), "the output of the saved adapter")


def test_layers_that_the_adapter_lacks_compute_as_their_base(tmp_path: Path) -> None:
    base = Net().double().eval()
    model = copy.deepcopy(base)
    ft.convert(model, ft.LoRA(r=4, targets=NAMES, init="random"))
    theirs = pefts(base, tmp_path, r=2, target_modules=["up"])
    report = ft.hotswap_adapter(model, tmp_path)
    assert report.changed == ("up",)
    assert list(report.skipped) == ["emb", "conv", "down"]
    assert_same(model(TOKENS), theirs)


def test_biases_come_along(tmp_path: Path) -> None:
    base = Net().double().eval()
    model = copy.deepcopy(base)
    names = ["conv", "up"]
    ft.convert(model, ft.LoRA(r=4, targets=names, bias="lora_only", lora_bias=True))
    options = {"target_modules": names, "bias": "lora_only", "lora_bias": True}
    theirs = pefts(base, tmp_path, r=2, **options)
    ft.hotswap_adapter(model, tmp_path)
    assert_same(model(TOKENS), theirs)
    assert not torch.equal(model.up.bias, base.up.bias)


def test_tensors_keep_the_scales_or_take_a_configs(tmp_path: Path) -> None:
    base = Net().double().eval()
    model = copy.deepcopy(base)
    ft.convert(model, ft.LoRA(r=4, alpha=8, targets=NAMES))
    theirs = pefts(base, tmp_path, r=2, lora_alpha=4)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ft.hotswap_adapter(model, tensors)
    assert_same(model(TOKENS), theirs)
    ft.hotswap_adapter(model, tensors, config=ft.LoRA(r=2, alpha=1, targets=NAMES))
    assert {model.get_submodule(name).scale for name in NAMES} == {0.5}
    with pytest.raises(ValueError, match="no config beside a folder"):
        ft.hotswap_adapter(model, tmp_path, config=ft.LoRA())


A = "base_model.model.up.lora_A.weight"
B = "base_model.model.up.lora_B.weight"


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"r": 2, "rank_pattern": {"up": 5}}, {}, r"up of rank 4 at most, got 5; convert with r=5"),
        ({"r": 2, "bias": "all"}, {}, "expected bias of 'none' as the model was converted"),
        ({"r": 2}, {A: None}, r"none for .*up\.lora_A"),
        ({"r": 2}, {A: torch.zeros(3, 8)}, r"lora_A.weight of rank 2, got \(3, 8\)"),
        ({"r": 2}, {B: torch.zeros(6, 3)}, r"lora_B.weight of rank 2, got \(6, 3\)"),
        ({"r": 2}, {A: torch.zeros(2, 7)}, r"of shape \(4, 8\), got \(4, 7\)"),
        ({"r": 2}, {A: torch.zeros(2, 8, 1)}, r"of shape \(4, 8\), got \(2, 8, 1\)"),
        ({"r": 2}, {A: torch.full((2, 8), float("inf"))}, "finite float64"),
        ({"r": 2}, {"base_model.model.other.lora_A.weight": torch.zeros(2, 8)}, "layers only"),
    ],
)
def test_nothing_changes_where_anything_does_not_fit(options, change, message, tmp_path) -> None:
    base = Net().double()
    pefts(base, tmp_path, **options)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, file)
    model = copy.deepcopy(base)
    ft.convert(model, ft.LoRA(r=4, targets=NAMES, init="random"))
    state, scales = copy.deepcopy(model.state_dict()), [model.get_submodule(n).scale for n in NAMES]
    with pytest.raises(ValueError, match=message):
        ft.hotswap_adapter(model, tmp_path)
    for name, value in model.state_dict().items():
        assert_exact(value, state[name], name)
    assert [model.get_submodule(n).scale for n in NAMES] == scales


def test_what_has_no_place_for_an_adapter(tmp_path: Path) -> None:
    base = Net().double()
    pefts(base, tmp_path, r=2)
    with pytest.raises(ValueError, match=r"hotswap_adapter: expected a model that convert\(\)"):
        ft.hotswap_adapter(base, tmp_path)
    model = copy.deepcopy(base)
    ft.convert(model, ft.LoRA(r=4, targets=["up"]))
    with pytest.raises(
        ValueError, match=r"expected tensors of the adapted layers only, got .*conv"
    ):
        ft.hotswap_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="of the model's layers, got none"):
        ft.hotswap_adapter(model, {})
    ft.merge(model)
    with pytest.raises(ValueError, match="up is merged, unmerge first"):
        ft.hotswap_adapter(model, tmp_path)


def test_a_rank_with_groups_is_as_it_is(tmp_path: Path) -> None:
    base = nn.ModuleDict({"c": nn.Conv1d(4, 4, 1, groups=2)})
    pefts(base, tmp_path, r=2, target_modules=["c"])
    model = copy.deepcopy(base)
    ft.convert(model, ft.LoRA(r=4, targets=["c"]))
    with pytest.raises(ValueError, match="c, which has groups, of rank 4, got 2"):
        ft.hotswap_adapter(model, tmp_path)


@pytest.mark.more
def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    base = Net().double().eval()
    model = copy.deepcopy(base)
    ft.convert(model, ft.LoRA(r=4, targets=NAMES, init="random"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(TOKENS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, options in enumerate(({"r": 4}, {"r": 2, "lora_alpha": 3}, {"r": 1})):
            theirs = pefts(base, tmp_path / str(i), **options)
            ft.hotswap_adapter(compiled, tmp_path / str(i))
            assert_same(compiled(TOKENS), theirs)
