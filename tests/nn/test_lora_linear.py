"""LoRALinear as the layer it stands in for: arithmetic, parameters, merging, and torch's tools."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import pyfastft as ft
from pyfastft.testing.tolerance import assert_accurate, assert_exact

HALF = [torch.bfloat16, torch.float16]


def make(kind: str = "linear", dtype: torch.dtype = torch.float32, **options) -> ft.nn.LoRALinear:
    base = Conv1D(7, 12) if kind == "conv1d" else nn.Linear(12, 7, bias=kind != "no bias")
    if kind == "conv1d":
        nn.init.normal_(base.bias)
    options = {"r": 3, "scale": 1.5, "init": "random", **options}
    return ft.nn.LoRALinear(base.to(dtype), **options)


def plain(layer: ft.nn.LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """PEFT's expression over the layer's parameters."""
    y = layer.base(x)
    update = x.to(layer.lora_a.dtype) @ layer.lora_a.T @ layer.lora_b.T
    if layer.lora_bias is not None:
        update = update + layer.lora_bias
    return (y + update * layer.scale).to(y.dtype)


def assert_base(y: torch.Tensor, base: nn.Module, x: torch.Tensor) -> None:
    """The output is that of the base alone."""
    truth = copy.deepcopy(base).double()(x.double())
    assert_accurate(y.detach(), truth.detach(), base(x).detach())


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("adapter_dtype", ["float32", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_forward_and_gradients(kind, dtype, adapter_dtype, lora_bias) -> None:
    layer = make(kind, dtype, adapter_dtype=adapter_dtype, lora_bias=lora_bias)
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    truth = copy.deepcopy(layer).double()
    naive = copy.deepcopy(layer)
    xt, xn = (x.detach().to(d).requires_grad_() for d in (torch.float64, dtype))
    outputs = layer(x), plain(truth, xt), plain(naive, xn)
    for y, leaf in zip(outputs, (x, xt, xn), strict=True):
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
        assert leaf.grad is not None
    assert_accurate(*(y.detach() for y in outputs))
    assert_accurate(x.grad, xt.grad, xn.grad, gradient=True, what="dx")
    for name, parameter in layer.named_parameters():
        t, n = (dict(m.named_parameters())[name].grad for m in (truth, naive))
        assert_accurate(parameter.grad, t, n, gradient=True, what=name)


def test_the_base_keeps_its_parameters_and_names() -> None:
    base = nn.Linear(4, 6)
    weight, bias = base.weight, base.bias
    layer = ft.nn.LoRALinear(base, r=2, scale=1.0)
    assert layer.weight is weight
    assert layer.bias is bias
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a", "lora_b"]
    x = torch.randn(3, 4)
    assert_base(layer(x), base, x)  # B is zero.
    assert layer.restore() is base


def test_initialisations() -> None:
    kaiming = make(init="kaiming", r=3)
    bound = 1 / 12**0.5
    assert kaiming.lora_a.abs().max() <= bound
    assert kaiming.lora_a.abs().max() > bound / 2
    assert not kaiming.lora_b.any()
    wide = ft.nn.LoRALinear(nn.Linear(2000, 2), r=8, scale=1.0, init="gaussian")
    assert 0.9 < float(wide.lora_a.detach().std() * 8) < 1.1
    assert not wide.lora_b.any()
    assert make(init="random").lora_b.all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_adapter_dtypes(dtype) -> None:
    assert make(dtype=dtype).lora_a.dtype is torch.float32
    assert make(dtype=dtype, adapter_dtype="base").lora_b.dtype is dtype
    assert make(dtype=torch.float64).lora_a.dtype is torch.float64


def test_dropout_only_while_training() -> None:
    layer = make(dropout=0.5)
    x = torch.randn(40, 12)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert_exact(layer(x), first, "the same seed's output")
    assert not torch.equal(layer(x), first)
    layer.eval()
    assert_exact(layer(x), make_equal(layer)(x), "the output in inference")
    assert not torch.equal(layer(x), first)


def make_equal(layer: ft.nn.LoRALinear) -> ft.nn.LoRALinear:
    """The same layer without dropout."""
    twin = copy.deepcopy(layer)
    twin.dropout = 0.0
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_merge_and_unmerge(kind, dtype, lora_bias) -> None:
    layer = make(kind, dtype, lora_bias=lora_bias).eval()
    x = torch.randn(5, 12, dtype=dtype)
    weight, bias, y = layer.weight.clone(), layer.bias.clone(), layer(x)
    pointer = layer.weight.data_ptr()
    layer.merge(safe=True)
    delta = (layer.lora_b @ layer.lora_a).double() * layer.scale
    truth = (weight.double() + (delta.T if kind == "conv1d" else delta)).to(dtype)
    assert_accurate(layer.weight.data, truth.double(), truth, what="the merged weight")
    once = layer.weight.clone()
    layer.merge()
    assert_exact(layer.weight.data, once, "the weight merged twice")
    wide = copy.deepcopy(layer).double()
    naive = layer.base(x)
    assert_accurate(layer(x), wide.base(x.double()), naive, what="the merged forward")
    layer.unmerge()
    layer.unmerge()
    assert_exact(layer.weight.data, weight, "the weight")
    assert_exact(layer.bias.data, bias, "the bias")
    assert_exact(layer(x), y, "the output")
    assert layer.weight.data_ptr() == pointer


def test_a_merged_layer_does_not_train() -> None:
    layer = make()
    layer.merge()
    x = torch.randn(2, 12)
    with pytest.raises(RuntimeError, match=r"merged .* unmerge\(\) before training"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.scale = 2.0
    with pytest.raises(RuntimeError, match=r"weight: the adapter is merged, unmerge\(\)"):
        layer.load_state_dict(make().state_dict())
    layer.unmerge()
    layer.load_state_dict(make().state_dict())


def test_safe_merge_changes_nothing_where_the_result_is_not_finite() -> None:
    layer = make()
    with torch.no_grad():
        layer.lora_b[0, 0] = float("inf")
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="merged weight is not finite"):
        layer.merge(safe=True)
    assert_exact(layer.weight.data, before, "the weight")
    assert not layer.merged


def test_an_adapter_bias_cannot_be_merged_into_none() -> None:
    with pytest.raises(ValueError, match="without a bias"):
        make("no bias", lora_bias=True).merge()


def test_disabled_adapters() -> None:
    model = nn.Sequential(make().eval(), nn.ReLU()).eval()
    x = torch.randn(3, 12)
    base, y = model[0].base(x).relu(), model(x)
    with ft.nn.disable_adapters(model):
        assert_exact(model(x), base, "the base's output")
    assert_exact(model(x), y, "the output")
    model[0].merge()
    merged = model(x)
    with ft.nn.disable_adapters(model):
        assert_exact(model(x), base, "the base's output")
    assert model[0].merged
    assert_exact(model(x), merged, "the merged output")


def test_scale() -> None:
    layer = make(scale=1.0).eval()
    x = torch.randn(3, 12)
    pointer = layer.scaling.data_ptr()
    layer.scale = 3.0
    assert layer.scaling.data_ptr() == pointer
    assert_exact(layer(x), make_scaled(layer)(x), "the output")
    layer.scale = 0.0
    assert_base(layer(x), layer.base, x)


def make_scaled(layer: ft.nn.LoRALinear) -> ft.nn.LoRALinear:
    """A new layer of the same values and scale."""
    twin = ft.nn.LoRALinear(copy.deepcopy(layer.base), r=layer.r, scale=layer.scale)
    twin.load_state_dict(layer.state_dict())
    return twin.eval()


def test_copies_and_files() -> None:
    layer = make(dropout=0.1).eval()
    x = torch.randn(3, 12)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert twin.base.weight is twin.weight is not layer.weight
    whole = pickle.loads(pickle.dumps(layer))
    assert whole.base.weight is whole.weight
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    for copied in (twin, whole, other):
        assert_exact(copied(x), y, "a copy's output")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_casting_keeps_the_scale_wide(dtype) -> None:
    layer = make(scale=1 / 3).to(dtype)
    assert layer.scaling.dtype is torch.float32
    assert layer.lora_a.dtype is dtype
    assert layer.base.weight is layer.weight
    assert layer(torch.randn(2, 12, dtype=dtype)).dtype is dtype
    assert layer.double().scaling.item() == 1 / 3


def test_meta_device() -> None:
    base = nn.Linear(12, 7, device="meta")
    layer = ft.nn.LoRALinear(base, r=3, scale=2.0)
    assert layer(torch.empty(4, 12, device="meta")).shape == (4, 7)
    layer.to_empty(device="cpu")
    source = make().state_dict()
    layer.load_state_dict(source)
    assert layer.scaling.item() == 2.0
    assert layer(torch.randn(4, 12)).isfinite().all()
    assert_exact(layer.restore().weight.data, source["weight"], "the restored weight")


@pytest.mark.parametrize("lora_bias", [False, True])
def test_autocast_casts_as_peft_does(lora_bias) -> None:
    layer = make(lora_bias=lora_bias)
    x = torch.randn(3, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, naive = layer(x), plain(layer, x)
    assert y.dtype is torch.bfloat16
    truth = plain(copy.deepcopy(layer).double(), x.double())
    assert_accurate(y.detach(), truth.detach(), naive.detach())
    y.sum().backward()
    assert x.grad.dtype is torch.float32
    assert layer.lora_a.grad.dtype is torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_replays_the_mask(reentrant) -> None:
    layer = make(dropout=0.4)
    x = torch.randn(30, 12, requires_grad=True)

    def gradients(run):
        torch.manual_seed(3)
        layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        return [p.grad.clone() for p in (x, *layer.parameters())]

    straight = gradients(layer)
    replayed = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    for a, b in zip(straight, replayed, strict=True):
        assert_exact(b, a, "gradient")


@pytest.mark.more
def test_compiles_whole_and_not_again_for_a_new_scale() -> None:
    layer = make(dropout=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(4, 12)
    for scale in (1.0, 2.0, 3.0):
        layer.scale = scale
        compiled(x).sum().backward()
    assert counter.frame_count == 1
    layer.eval()
    assert_exact(compiled(x), layer(x), "the compiled output")


def test_hooks_move_with_the_layer() -> None:
    base = nn.Linear(4, 4)
    seen = []
    handle = base.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    layer = ft.nn.LoRALinear(base, r=2, scale=1.0)
    layer(torch.randn(1, 4))
    assert seen == [ft.nn.LoRALinear]
    handle.remove()
    layer(torch.randn(1, 4))
    layer.restore()(torch.randn(1, 4))
    assert len(seen) == 1


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (nn.Embedding(3, 4), "Embedding is no nn.Linear or Conv1D"),
        (Doubled(3, 4), "Doubled has a forward of its own"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "no plain Parameter"),
        (nn.LazyLinear(4), "UninitializedParameter"),
    ],
)
def test_what_it_cannot_stand_in_for(base, reason) -> None:
    with pytest.raises(TypeError, match=reason):
        ft.nn.LoRALinear(base, r=2, scale=1.0)
