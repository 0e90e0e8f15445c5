"""Convolutions with 4-bit weights, alone and with a low-rank update: the dense convolution of what
the codes stand for, in panels, and what is kept for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pyfastft as ft
from pyfastft import ops
from pyfastft._codebook import TABLES
from pyfastft.quantization import QTensor4, quantize_weight
from pyfastft.quantization.tensor import pack_codes, unpack_codes
from pyfastft.testing.tolerance import assert_accurate, assert_exact
from pyfastft.triton_kernels import _int4_engine

F = ft.functional
DENSE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel": 3},
    "stride": {"kernel": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel": 3, "dilation": 2, "padding": 2},
    "same": {"kernel": 3, "padding": "same"},
    "same even": {"kernel": 2, "padding": "same", "dilation": 1},
    "valid": {"kernel": 2, "padding": "valid"},
    "circular": {"kernel": 3, "padding": 2, "padding_mode": "circular"},
    "pointwise": {"kernel": 1},
    "pointwise stride": {"kernel": 1, "stride": 2},
    "pointwise padding": {"kernel": 1, "padding": 1},
    "groups": {"kernel": 3, "groups": 2, "padding": 1},
}
CHANNELS, OUT = 4, 6


def drawn(dims: int, kernel: int, groups: int = 1, kind: str = "hqq") -> tuple[QTensor4, tuple]:
    """A weight and its shape."""
    shape = (OUT, CHANNELS // groups, *[kernel] * dims)
    config = ft.PTQ4(codebook="nf4", group_size=5) if kind == "nf4" else ft.PTQ4(group_size=6)
    return quantize_weight(torch.randn(shape).flatten(1), config), shape


def operands(weight: QTensor4) -> dict[str, Any]:
    return {
        "codes": weight.codes,
        "scale": weight.scale,
        "zero": weight.zero,
        "perm": weight.perm,
        "group_size": weight.group_size,
        "codebook": weight.codebook,
    }


def both(name: str, dims: int, x: torch.Tensor, low_rank: bool = False) -> list[list[torch.Tensor]]:
    """Outputs and gradients of ours, and of the dense convolution."""
    options = dict(OPTIONS[name])
    kernel = options.pop("kernel")
    groups = options.get("groups", 1)
    weight, shape = drawn(dims, kernel, groups)
    dense = weight.dequantize(x.dtype).view(shape)
    bias = torch.randn(OUT, dtype=x.dtype)
    found = []
    a = torch.randn(2, CHANNELS, *shape[2:], dtype=x.dtype)
    b = torch.randn(OUT, 2 // groups, dtype=x.dtype)
    grad = None
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, bias, a, b)]
        i, c, u, v = leaves
        if low_rank and ours:
            y = F.int4_lora_conv(i, lora_a=u, lora_b=v, bias=c, **operands(weight), **options)
        elif low_rank:
            y = F.lora_conv(i, dense, u, v, bias=c, **options)
        elif ours:
            size = {"kernel_size": shape[2:]}
            y = F.int4_conv(i, bias=c, **operands(weight), **size, **options)
        else:
            made = getattr(nn, f"Conv{dims}d")(CHANNELS, OUT, kernel, **options, dtype=x.dtype)
            y = made._conv_forward(i, dense, c)
        if grad is None:
            grad = torch.randn_like(y)
        wanted = leaves if low_rank else leaves[:2]
        found.append([y, *torch.autograd.grad(y, wanted, grad)])
    return found


@pytest.mark.parametrize("low_rank", [False, True], ids=["alone", "lora"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dims", DENSE)
def test_it_is_the_dense_convolution(dims: int, name: str, low_rank: bool) -> None:
    for leading in ((), (3,)):
        x = torch.randn(*leading, CHANNELS, *range(6, 6 + dims), dtype=torch.float64)
        for ours, theirs in zip(*both(name, dims, x, low_rank), strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["stride", "pointwise"])
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    options = dict(OPTIONS[name])
    weight, shape = drawn(2, options.pop("kernel"), kind="nf4")
    x = torch.randn(2, CHANNELS, 9, 8).to(dtype)
    y = F.int4_conv(x, **operands(weight), kernel_size=shape[2:], **options)
    dense = weight.dequantize(torch.float64).view(shape)
    truth = DENSE[2](x.double(), dense, **options)
    assert y.dtype is dtype
    assert_accurate(y, truth, DENSE[2](x, dense.to(dtype), **options))


@pytest.mark.parametrize("groups", [1, 2])
def test_panels_are_of_bounded_size(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_int4_engine, "PANEL_BYTES", 1)
    monkeypatch.setattr(_int4_engine, "PANEL_MULTIPLE", 2)
    rows = []
    dequantize = ops.int4_dequantize

    def watched(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(codes))
        return dequantize(codes, *rest)

    monkeypatch.setattr(ops, "int4_dequantize", watched)
    weight, shape = drawn(2, 3, groups)
    dense = weight.dequantize(torch.float64).view(shape)
    rows.clear()
    x = torch.randn(2, CHANNELS, 7, 6, dtype=torch.float64, requires_grad=True)
    size = {"kernel_size": (3, 3), "groups": groups}
    y = F.int4_conv(x, **operands(weight), **size)
    expected = DENSE[2](x, dense, groups=groups)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, grad)[0])
    assert rows == (2 * [2, 2, 2] if groups == 1 else 2 * [2, 1, 2, 1])


@pytest.mark.parametrize("low_rank", [False, True], ids=["alone", "lora"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_nothing_dense_is_kept(kernel: int, low_rank: bool) -> None:
    """Between forward and backward there are x and the thin factors, and no W."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 96, kernel, padding=kernel // 2)
    model = nn.Sequential(conv)
    ft.quantize(model, ft.PTQ4(codebook="nf4", targets=["0"]))
    if low_rank:
        ft.convert(model, ft.LoRA(r=2, targets=["0"], init="random"))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(1, 64, 2, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    assert max(t.numel() * t.itemsize for t in kept) < conv.weight.nbytes / 4
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_stay_last(kernel: int) -> None:
    weight, shape = drawn(2, kernel)
    x = torch.randn(2, CHANNELS, 6, 5)
    call = {"kernel_size": shape[2:], **operands(weight)}
    y = F.int4_conv(x.to(memory_format=torch.channels_last), **call)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.int4_conv(x, **call))


def test_gradients_of_gradients() -> None:
    weight, shape = drawn(2, 3)
    x = torch.randn(1, CHANNELS, 4, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.int4_conv(x, bias=bias, kernel_size=shape[2:], padding=1, **operands(weight))

    assert torch.autograd.gradcheck(call, (x, bias))
    assert torch.autograd.gradgradcheck(call, (x, bias))


def trainable(kernel: int, groups: int, codebook: str, permuted: bool) -> dict[str, Any]:
    """A weight whose scales and zero-points take a gradient, its last groups short; float64."""
    n, k, size = OUT, CHANNELS // groups * kernel**2, 5
    grid = (n, -(-k // size))
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    zero = (7 + 2 * torch.rand(grid, dtype=torch.float64)).requires_grad_()
    return {
        "codes": pack_codes(codes),
        "scale": (0.1 + torch.rand(grid, dtype=torch.float64)).requires_grad_(),
        "zero": zero if codebook == "int4" else None,
        "perm": torch.randperm(k, dtype=torch.int32) if permuted else None,
        "group_size": size,
        "codebook": codebook,
    }


def differentiable(weight: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
    """What the codes stand for, by operators that torch differentiates."""
    k = shape[1] * shape[2] * shape[3]
    codes = unpack_codes(weight["codes"], k)
    group = torch.arange(k) // weight["group_size"]
    if weight["codebook"] == "int4":
        w = (codes.double() - weight["zero"][:, group]) * weight["scale"][:, group]
    else:
        table = torch.tensor(TABLES[weight["codebook"]], dtype=torch.float32).double()
        w = table[codes.long()] * weight["scale"][:, group]
    order = torch.arange(k) if weight["perm"] is None else weight["perm"].long()
    return w[:, order.argsort()].view(shape)


@pytest.mark.parametrize("low_rank", [False, True], ids=["alone", "lora"])
@pytest.mark.parametrize(
    ("kernel", "groups", "codebook", "permuted", "panels"),
    [
        (3, 1, "int4", False, False),
        (3, 1, "int4", True, True),
        (3, 2, "int4", True, False),
        (3, 2, "int4", False, True),
        (3, 1, "nf4", False, False),
        (1, 1, "int4", True, False),
    ],
)
def test_gradients_of_scales_and_zeros(
    kernel: int,
    groups: int,
    codebook: str,
    permuted: bool,
    panels: bool,
    low_rank: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if panels:
        monkeypatch.setattr(_int4_engine, "PANEL_BYTES", 1)
        monkeypatch.setattr(_int4_engine, "PANEL_MULTIPLE", 2)
    weight = trainable(kernel, groups, codebook, permuted)
    shape = (OUT, CHANNELS // groups, kernel, kernel)
    x = torch.randn(2, CHANNELS, 6, 5, dtype=torch.float64)
    leaves = [t for t in (weight["scale"], weight["zero"]) if t is not None]
    dense = differentiable(weight, shape)
    for of_x in (False, True):
        wanted = [x.requires_grad_(), *leaves] if of_x else leaves
        expected = DENSE[2](x, dense, groups=groups)
        if low_rank:
            a = torch.randn(2, CHANNELS, kernel, kernel, dtype=torch.float64)
            b = torch.zeros(OUT, 2 // groups, dtype=torch.float64)
            y = F.int4_lora_conv(x, lora_a=a, lora_b=b, groups=groups, **weight)
        else:
            y = F.int4_conv(x, kernel_size=shape[2:], groups=groups, **weight)
        torch.testing.assert_close(y, expected)
        grad = torch.randn_like(y)
        found = torch.autograd.grad(y, wanted, grad)
        for ours, theirs in zip(
            found, torch.autograd.grad(expected, wanted, grad, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_scales_in_float32_and_a_second_derivative() -> None:
    weight, shape = drawn(2, 3)
    held = operands(weight)
    held["scale"] = weight.scale.clone().requires_grad_()
    held["zero"] = weight.zero.float().requires_grad_()
    wide = {name: held[name].detach().double().requires_grad_() for name in ("scale", "zero")}
    x = torch.randn(2, CHANNELS, 6, 5)
    grad = torch.randn(2, OUT, 4, 3)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [held["scale"], held["zero"]]
        y = F.int4_conv(x.to(dtype), kernel_size=shape[2:], **held)
        found = torch.autograd.grad(y, leaves, grad.to(dtype))
        rounded = {**held, **{name: t.detach().requires_grad_() for name, t in wide.items()}}
        naive = DENSE[2](x.to(dtype), differentiable(rounded, shape).to(dtype))
        pair = [rounded["scale"], rounded["zero"]]
        theirs = torch.autograd.grad(naive, pair, grad.to(dtype))
        # The truth of what came in, which was rounded already.
        exact = DENSE[2](x.to(dtype).double(), differentiable(rounded, shape))
        truth = torch.autograd.grad(exact, pair, grad.to(dtype).double())
        for ours, naive_one, true in zip(found, theirs, truth, strict=True):
            assert ours.dtype is torch.float32
            assert_accurate(ours, true, naive_one.float(), gradient=True)
            # The naive one sums the same dW in float64.
            assert float((ours - naive_one).abs().max()) < 1e-5 * float(true.abs().max())
    x.requires_grad_()
    y = F.int4_conv(x, kernel_size=shape[2:], **held)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.more
def test_it_compiles_with_trained_scales() -> None:
    weight, shape = drawn(2, 3)
    held = {**operands(weight), "zero": weight.zero.float().requires_grad_()}
    held["scale"] = weight.scale.clone().requires_grad_()
    leaves = [held["scale"], held["zero"]]

    def call(x: torch.Tensor) -> torch.Tensor:
        return F.int4_conv(x, kernel_size=shape[2:], **held)

    x = torch.randn(1, CHANNELS, 5, 5)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(c(x).square().sum(), leaves) for c in (compiled, call))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast() -> None:
    weight, shape = drawn(2, 3)
    x, bias = torch.randn(1, CHANNELS, 5, 5, requires_grad=True), torch.randn(OUT)
    size = {"kernel_size": shape[2:]}
    with torch.autocast("cpu", torch.bfloat16):
        y = F.int4_conv(x, bias=bias, **operands(weight), **size)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype is torch.float32
    expected = F.int4_conv(x.bfloat16(), bias=bias.bfloat16(), **operands(weight), **size)
    assert_exact(y, expected, "the output")


def test_dropout_is_that_of_the_low_rank_path() -> None:
    weight, shape = drawn(2, 3)
    a, b = torch.randn(2, CHANNELS, 3, 3), torch.randn(OUT, 2)
    x = torch.randn(2, CHANNELS, 6, 6)
    base = F.int4_conv(x, **operands(weight), kernel_size=shape[2:])
    gone = F.int4_lora_conv(x, lora_a=a, lora_b=b, p=1.0, **operands(weight))
    assert_exact(gone, base, "everything dropped")
    torch.manual_seed(4)
    first = F.int4_lora_conv(x, lora_a=a, lora_b=b, p=0.5, **operands(weight))
    torch.manual_seed(4)
    dense = weight.dequantize(torch.float32).view(shape)
    torch.testing.assert_close(first, F.lora_conv(x, dense, a, b, p=0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 3)}, r"expected x of shape \(..., C, \*size\)"),
        ({"x": torch.randn(1, 5, 6, 6)}, r"codes of shape \(N, 23\)"),
        ({"kernel_size": (3,) * 4}, "expected kernel_size of one to three sizes"),
        ({"groups": 3}, "expected groups of a divisor of 4, got 3"),
        ({"x": [1]}, "expected x of type Tensor"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], message: str) -> None:
    weight, shape = drawn(2, 3)
    call = {"x": torch.randn(1, CHANNELS, 6, 6), "kernel_size": shape[2:], **operands(weight)}
    with pytest.raises((TypeError, ValueError), match=message):
        F.int4_conv(**{**call, **change})


def test_what_the_low_rank_one_refuses() -> None:
    weight, _ = drawn(2, 3)
    x, a, b = torch.randn(1, CHANNELS, 6, 6), torch.randn(2, CHANNELS, 3, 3), torch.randn(OUT, 2)
    call = {"x": x, "lora_a": a, "lora_b": b, **operands(weight)}
    assert F.int4_lora_conv(**call).shape == (1, OUT, 4, 4)
    expected = "int4_lora_conv: expected"
    with pytest.raises(ValueError, match=rf"{expected} lora_a of shape \(R, 4, 3, 3\)"):
        F.int4_lora_conv(**{**call, "lora_a": torch.randn(2, 5, 3, 3)})
    with pytest.raises(ValueError, match=rf"{expected} lora_b of shape \(6, 2\)"):
        F.int4_lora_conv(**{**call, "lora_b": torch.randn(OUT, 3)})
    with pytest.raises(TypeError, match=f"{expected} lora_b of dtype float32"):
        F.int4_lora_conv(**{**call, "lora_b": b.double()})
