"""The block-sparse layer against the dense one of the same weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyfastft as ft
from pyfastft.testing.tolerance import assert_accurate, assert_exact


def layers() -> tuple[nn.Linear, ft.nn.BlockSparseLinear]:
    """A dense layer, and the same of the blocks that are not zero."""
    dense = nn.Linear(20, 24)
    with torch.no_grad():
        dense.weight[:8, 8:] = 0
        dense.weight[8:16] = 0
    pattern = ft.pruning.BlockPattern.from_weight(dense.weight, block=(8, 4))
    values = pattern.values(dense.weight.detach())
    return dense, ft.nn.BlockSparseLinear.in_place_of(dense, values, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_and_trains_as_the_dense_layer(dtype) -> None:
    dense, layer = (one.to(dtype) for one in layers())
    assert_exact(layer.dense(), dense.weight)
    assert layer.bias is dense.bias
    x = torch.randn(2, 3, 20, dtype=dtype)
    truth = copy.deepcopy(dense).double()
    outputs = [one(x.to(one.bias.dtype)) for one in (layer, truth, dense)]
    assert_accurate(*outputs)
    gradients = []
    for y, one in zip(outputs, (layer.values, truth.weight, dense.weight), strict=True):
        y.square().sum().backward()
        gradients.append(one.grad if one is layer.values else layer.pattern.values(one.grad))
    assert_accurate(*gradients, gradient=True)


def test_it_has_the_mode_and_the_hooks_of_the_layer_before() -> None:
    dense, _ = layers()
    dense.eval().weight.requires_grad_(False)
    seen = []
    handle = dense.register_forward_hook(lambda *_: seen.append(1))
    pattern = ft.pruning.BlockPattern.from_weight(dense.weight, block=(8, 4))
    layer = ft.nn.BlockSparseLinear.in_place_of(dense, pattern.values(dense.weight), pattern)
    assert not layer.training
    assert not layer.values.requires_grad
    layer(torch.ones(20))
    handle.remove()
    layer(torch.ones(20))
    assert seen == [1]


def test_it_is_copied_moved_and_loaded() -> None:
    _, layer = layers()
    layer.values.requires_grad_(False)
    twin = copy.deepcopy(layer)
    assert twin.pattern.index is twin.index
    assert twin.index is not layer.index
    assert not twin.values.requires_grad
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert list(state) == ["values", "bias", "index"]
    nn.init.zeros_(twin.values)
    twin.load_state_dict(state)
    assert_exact(twin.values, layer.values)
    twin.load_state_dict(state, assign=True)
    assert twin.pattern.index is twin.index is not layer.index
    twin._apply(torch.clone)  # as a move to another device
    assert twin.pattern.index is twin.index
    assert twin.half().values.dtype is torch.float16
    assert twin.index.dtype is torch.int32
    state["index"] = state["index"].flip(0)
    before = layer.index.clone()
    with pytest.raises(ValueError, match="BlockPattern: expected index of"):
        layer.load_state_dict(state)
    assert_exact(layer.index, before)


def test_what_does_not_fit_is_refused() -> None:
    _, layer = layers()
    values, pattern = layer.values.detach(), layer.pattern
    with pytest.raises(ValueError, match="BlockSparseLinear: expected values of shape"):
        ft.nn.BlockSparseLinear(values[1:], pattern)
    with pytest.raises(ValueError, match=r"expected bias of shape \(24,\) to match the pattern"):
        ft.nn.BlockSparseLinear(values, pattern, bias=torch.ones(23))
    with pytest.raises(TypeError, match="expected bias of dtype float32 to match values, got"):
        ft.nn.BlockSparseLinear(values, pattern, bias=torch.ones(24).double())
    assert ft.nn.BlockSparseLinear(values, pattern)(torch.ones(20)).shape == (24,)
