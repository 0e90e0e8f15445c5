"""Convolutions and embeddings with a low-rank update: merged weights, PEFT, gradients."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import pyfastft as ft
from pyfastft.testing.tolerance import assert_accurate, assert_exact

F = ft.functional
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
OPTIONS = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate same": {"kernel_size": 2, "padding": "same", "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "circular"},
    "pointwise": {"kernel_size": 1},
    "pointwise stride": {"kernel_size": 1, "stride": 2},
    "pointwise padding": {"kernel_size": 1, "padding": 1},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "pointwise groups": {"kernel_size": 1, "groups": 2},
}
PEFTS = [name for name in OPTIONS if "dilation" not in OPTIONS[name]]
PEFTS = [name for name in PEFTS if "padding_mode" not in OPTIONS[name]]


def make(dims: int, name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict]:
    """A base convolution of 4 to 6 channels, and lora_conv's arguments beside it."""
    base = KINDS[dims](4, 6, **OPTIONS[name], dtype=dtype)
    a = torch.randn(2, 4, *base.kernel_size, dtype=dtype)
    b = torch.randn(6, 2 // base.groups, dtype=dtype)
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    options = {option: getattr(base, option) for option in names}
    return base, {"weight": base.weight, "lora_a": a, "lora_b": b, "bias": base.bias, **options}


def whole(arguments: dict, scaling: float) -> torch.Tensor:
    """W + s B A as a convolution without groups."""
    w, a, b, groups = (arguments[name] for name in ("weight", "lora_a", "lora_b", "groups"))
    (n, k), r = w.shape[:2], a.shape[0]
    dense = w.new_zeros(n, k * groups, *w.shape[2:])
    up = w.new_zeros(n, r)
    for g in range(groups):
        rows = slice(g * n // groups, (g + 1) * n // groups)
        dense[rows, g * k : (g + 1) * k] = w[rows]
        up[rows, g * r // groups : (g + 1) * r // groups] = b[rows]
    return dense + scaling * torch.einsum("nr,r...->n...", up, a)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dims", KINDS)
def test_it_is_the_convolution_with_the_merged_weight(dims: int, name: str) -> None:
    base, arguments = make(dims, name)
    merged = KINDS[dims](4, 6, **{**OPTIONS[name], "groups": 1}, dtype=torch.float64)
    merged.load_state_dict({"weight": whole(arguments, 1.5), "bias": base.bias})
    for leading in ((), (3,), (0,)):
        x = torch.randn(*leading, 4, *range(7, 7 + dims), dtype=torch.float64)
        if leading == (0,) and OPTIONS[name].get("padding_mode", "zeros") != "zeros":
            continue
        y, expected = F.lora_conv(x, **arguments, scaling=1.5), merged(x)
        assert y.shape == expected.shape
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", ["float32", "base"])
@pytest.mark.parametrize("name", ["stride", "groups", "pointwise stride"])
def test_gradients_and_dtypes(name: str, adapters: str, dtype: torch.dtype) -> None:
    _, arguments = make(2, name)
    x = torch.randn(3, 4, 9, 8)
    results = []

    def plain(x, weight, lora_a, lora_b, bias, groups, padding_mode, **place):
        y = nn.functional.conv2d(x, weight, bias, groups=groups, **place)
        s = nn.functional.conv2d(x.to(lora_a.dtype), lora_a, **place)
        return (y + 1.5 * nn.functional.conv2d(s, lora_b[..., None, None], groups=groups)).to(
            x.dtype
        )

    def ours(x, **arguments):
        return F.lora_conv(x, **arguments, scaling=1.5)

    narrow = torch.float32 if adapters == "float32" else dtype
    dtypes = {"x": dtype, "weight": dtype, "bias": dtype, "lora_a": narrow, "lora_b": narrow}
    leaves = {"x": x, **{n: arguments[n] for n in ("weight", "bias", "lora_a", "lora_b")}}
    rounded = {n: t.detach().to(dtypes[n]) for n, t in leaves.items()}
    for function, wide in ((ours, False), (plain, True), (plain, False)):
        own = {n: (t.double() if wide else t.clone()).requires_grad_() for n, t in rounded.items()}
        y = function(**{**arguments, **own})
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype)
        results.append([y.detach(), *torch.autograd.grad(y, [*own.values()], weights.to(y.dtype))])
    for i, (mine, truth, naive) in enumerate(zip(*results, strict=True)):
        assert_accurate(mine, truth, naive, gradient=i > 0, what=f"result {i}")


@pytest.mark.parametrize("name", ["stride", "circular", "groups"])
def test_gradcheck(name: str) -> None:
    _, arguments = make(1, name)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    scaling = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    names = ("weight", "lora_a", "lora_b", "bias")
    leaves = [arguments.pop(name).detach().requires_grad_() for name in names]

    def run(x, scaling, *tensors):
        tensors = dict(zip(names, tensors, strict=True))
        return F.lora_conv(x, **tensors, **arguments, scaling=scaling)

    assert torch.autograd.gradcheck(run, (x, scaling, *leaves))


@pytest.mark.parametrize("name", ["plain", "pointwise", "circular"])
def test_dropout_is_of_the_update_alone_and_has_its_expectation(name: str) -> None:
    _, arguments = make(1, name, torch.float32)
    x = torch.randn(2, 4, 9)
    # Another probability of the same path: without dropout, a pointwise one may take another.
    base = F.lora_conv(x, **arguments, scaling=0.0, p=0.2)
    wide = F.lora_conv(x.double(), **doubled(arguments), scaling=0.0)
    assert_accurate(base, wide, F.lora_conv(x, **arguments, scaling=0.0))
    assert_exact(F.lora_conv(x, **arguments, scaling=0.0, p=0.9), base, "the base's output")
    torch.manual_seed(1)
    first = F.lora_conv(x, **arguments, p=0.5)
    torch.manual_seed(1)
    assert_exact(F.lora_conv(x, **arguments, p=0.5), first, "the same seed's output")
    draws = torch.stack([F.lora_conv(x, **arguments, p=0.5) for _ in range(400)]).double()
    sigma = draws.std(0) / len(draws) ** 0.5
    expected = F.lora_conv(x, **arguments)
    assert ((draws.mean(0) - expected).abs() <= 7 * sigma).all()
    assert_exact(F.lora_conv(x, **arguments, p=1.0), base, "everything dropped")


def test_channels_last_stays() -> None:
    for name in ("plain", "pointwise"):
        _, arguments = make(2, name, torch.float32)
        x = torch.randn(2, 4, 7, 6)
        y = F.lora_conv(x.to(memory_format=torch.channels_last), **arguments)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_accurate(
            y, F.lora_conv(x.double(), **doubled(arguments)), F.lora_conv(x, **arguments)
        )


def doubled(arguments: dict) -> dict:
    return {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


@pytest.mark.parametrize("name", PEFTS)
@pytest.mark.parametrize("dims", KINDS)
def test_it_is_pefts_layer(dims: int, name: str) -> None:
    base, _ = make(dims, name, torch.float32)
    model = peft.get_peft_model(
        nn.ModuleDict({"c": base}),
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=["c"], init_lora_weights=False),
    )
    layer = model.base_model.model["c"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 4, *range(6, 6 + dims))
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    options = {option: getattr(base, option) for option in names}
    y = F.lora_conv(x, base.weight, a, b, bias=base.bias, scaling=1.5, **options)
    truth = copy.deepcopy(layer).double()(x.double())
    assert_accurate(y.detach(), truth.detach(), layer(x).detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_a": torch.randn(2, 4, 2)}, r"lora_a of shape \(R, 4, 3\) to match weight"),
        ({"lora_b": torch.randn(6, 3)}, r"lora_b of shape \(6, 2\)"),
        ({"lora_b": torch.randn(6, 2, 3)}, r"lora_b of shape \(6, 2\)"),
        ({"bias": torch.randn(5)}, r"bias of shape \(6,\)"),
        ({"p": 1.5}, "p of a probability"),
        ({"groups": 4}, "groups of a divisor of 6"),
        ({"padding_mode": "mirror"}, "padding_mode of 'zeros'"),
        ({"padding": "some", "padding_mode": "circular"}, "padding of 'same'"),
        ({"weight": torch.randn(6, 4)}, "weight of shape"),
        ({"x": torch.randn(4)}, r"x of shape \(..., 4, \*size\)"),
        ({"x": torch.randn(1, 4, 8, dtype=torch.float64)}, "weight of dtype float64"),
    ],
)
def test_what_does_not_fit(change: dict, message: str) -> None:
    _, arguments = make(1, "plain", torch.float32)
    with pytest.raises((TypeError, ValueError), match=f"lora_conv: expected {message}"):
        F.lora_conv(**{"x": torch.randn(1, 4, 8), **arguments, **change})


# -- embeddings ------------------------------------------------------------------------------------


def table(dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Embedding, ...]:
    base = nn.Embedding(9, 5, **options, dtype=dtype)
    return base, torch.randn(3, 9, dtype=dtype), torch.randn(5, 3, dtype=dtype)


INDICES = torch.tensor([[1, 4, 4], [0, 8, 1]])


def test_an_embedding_is_that_of_the_merged_table() -> None:
    base, a, b = table()
    merged = base.weight + 1.5 * (b @ a).T
    for indices in (INDICES, INDICES[0, 0], INDICES[:, :0], INDICES.int()):
        y = F.lora_embedding(indices, base.weight, a, b, scaling=1.5)
        torch.testing.assert_close(y, nn.functional.embedding(indices, merged))


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 4}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"sparse": True}],
    ids=str,
)
def test_an_embedding_is_pefts(options: dict) -> None:
    # PEFT's layer has no backward where the gradients are sparse.
    base, _, _ = table(torch.float32, **{n: v for n, v in options.items() if n != "sparse"})
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["e"], init_lora_weights=False)
    model = peft.get_peft_model(nn.ModuleDict({"e": base}), config)
    layer = model.base_model.model["e"]

    def ours(one):
        return F.lora_embedding(INDICES, *leaves_of(one), scaling=4 / 3, **options)

    def leaves_of(one):
        up, down = one.lora_embedding_A["default"], one.lora_embedding_B["default"]
        return [one.base_layer.weight.requires_grad_(), up, down]

    results = []
    wide = copy.deepcopy(layer).double()
    for one, own in ((copy.deepcopy(layer), True), (wide, False), (layer, False)):
        leaves = leaves_of(one)
        y = ours(one) if own else one(INDICES)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        gradients = torch.autograd.grad(y, leaves, weights)
        results.append([y.detach(), *(g.to_dense() for g in gradients)])
        assert [g.is_sparse for g in gradients] == [own and "sparse" in options, False, False]
    for i, (mine, truth, naive) in enumerate(zip(*results, strict=True)):
        assert_accurate(mine, truth, naive, gradient=i > 0, what=f"result {i}")
    if options.get("padding_idx") == 4:
        assert not results[0][1][4].any()
        assert not results[0][2][:, 4].any()


def test_an_embeddings_gradcheck() -> None:
    base, a, b = table(padding_idx=0)
    leaves = [t.detach().requires_grad_() for t in (base.weight, a, b)]
    scaling = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    run = lambda *t: F.lora_embedding(INDICES, *t[:3], scaling=t[3])  # noqa: E731
    assert torch.autograd.gradcheck(run, (*leaves, scaling))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_embedding_keeps_the_tables_dtype(dtype: torch.dtype) -> None:
    base, a, b = table()
    low = base.weight.detach().to(dtype)
    a, b = a.float(), b.float()
    y = F.lora_embedding(INDICES, low, a, b)
    truth = F.lora_embedding(INDICES, low.double(), a.double(), b.double())
    naive = (low[INDICES] + a.T[INDICES] @ b.T).to(dtype)
    assert_accurate(y, truth, naive)
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(F.lora_embedding(INDICES, low, a, b), y, "the output under autocast")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.zeros(2)}, "indices of dtype"),
        ({"lora_a": torch.randn(3, 8)}, r"lora_a of shape \(R, 9\)"),
        ({"lora_b": torch.randn(5, 2)}, r"lora_b of shape \(5, 3\)"),
        ({"lora_b": torch.randn(5, 3, dtype=torch.float64)}, "lora_b of dtype"),
        ({"weight": torch.zeros(9, 5, dtype=torch.int32)}, "weight of dtype"),
    ],
)
def test_what_does_not_fit_an_embedding(change: dict, message: str) -> None:
    base, a, b = table(torch.float32)
    arguments = {"indices": INDICES, "weight": base.weight, "lora_a": a, "lora_b": b, **change}
    with pytest.raises((TypeError, ValueError), match=f"lora_embedding: expected {message}"):
        F.lora_embedding(**arguments)


def test_one_stride_for_all_dimensions_as_torch_reads_it() -> None:
    _, arguments = make(2, "pointwise stride")
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expected = F.lora_conv(x, **arguments)
    torch.testing.assert_close(F.lora_conv(x, **{**arguments, "stride": (2,)}), expected)
