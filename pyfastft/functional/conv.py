"""Convolutions with a low-rank update: A convolves as the base does, B is pointwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from pyfastft._check import FLOATS, expect_dense, expect_dtype, expect_shape, name_of, reject
from pyfastft._random import dropout_threshold
from pyfastft.functional._arguments import as_scaling
from pyfastft.functional.linear import lora_linear
from pyfastft.ops.lora._operands import wide

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the weight's dimensions


def lora_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scaling: float | torch.Tensor = 1.0,
    p: float = 0.0,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    r"""A convolution of one, two or three dimensions with a low-rank update.

    .. math:: y = x * W + b + s \cdot B\, (\mathrm{dropout}_p(x) * A)

    A has W's kernel and moves as W does, by stride, padding, dilation and padding mode; B is a
    convolution of kernel 1. With groups, A sees all channels and B is grouped: outputs of group g
    come from the ranks of group g.

    Args:
        x: input of shape (..., K, \*size), with or without a batch dimension.
        weight: W of shape (N, K / groups, \*kernel), of x's dtype; its dimensions say which
            convolution it is.
        lora_a: A of shape (R, K, \*kernel), of x's dtype, or float32 beside a half-precision base.
        lora_b: B of shape (N, R / groups), or with ones behind it as a kernel; of A's dtype.
        bias: b of shape (N,), of x's dtype.
        scaling: s; a tensor of one element can change without recompilation.
        p: dropout probability of the low-rank path's input; the mask is drawn from torch's
            generator.
        stride, padding, dilation, groups: as of :func:`torch.nn.functional.conv2d`.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Returns:
        y of x's dtype and of the shape that the convolution with W gives.

    Raises:
        ValueError: a shape, device, probability or padding mode does not fit; what torch's
            convolution refuses, stride and padding among it, is a RuntimeError of torch's.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.

    Note:
        A kernel of 1 without groups runs as :func:`lora_linear` over the channels where that is
        faster: with dropout, strides, or the channels last. All else is torch's convolutions and a
        product that adds the update, see ``ops/lora.md``.

    Reference:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; its convolution as
        PEFT has it, with the dilation and padding mode that PEFT's A lacks.
    """
    _expect_operands(x, weight, lora_a, lora_b, bias, p, groups, padding_mode)
    dims = weight.dim() - 2
    drops = dropout_threshold(p) > 0
    if is_pointwise(weight.shape[2:], padding, groups) and (
        drops or _is_channels_last(x, dims) or max(each(stride, dims)) > 1
    ):
        base = partial(lora_linear, weight=weight.flatten(1), bias=bias)
        factors = {"lora_a": lora_a.flatten(1), "lora_b": lora_b.flatten(1)}
        linear = partial(base, **factors, scaling=scaling, p=p)
        return over_channels(x, stride, dims, linear)
    x, dropped, padding = prepared(x, p, padding, dilation, weight.shape[2:], padding_mode)
    place = (stride, padding, dilation)
    convolve: Any = CONVOLUTIONS[dims + 2]
    y = convolve(x, weight, bias, *place, groups)
    return updated(y, dropped, lora_a, lora_b, as_scaling(scaling, x), place, groups)


def is_pointwise(kernel: Sequence[int], padding: int | str | Sequence[int], groups: int) -> bool:
    """Whether a convolution is a linear layer over the channels of every place."""
    return math.prod(kernel) == 1 and groups == 1 and not any(_sides(padding, 1, kernel))


def over_channels(
    x: torch.Tensor,
    stride: int | Sequence[int],
    dims: int,
    linear: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """A linear layer over the channels of the places that a kernel of 1 visits; channels that are
    last stay so."""
    channels_last = _is_channels_last(x, dims)
    for dim, step in enumerate(each(stride, dims), -dims):
        x = x if step == 1 else x.movedim(dim, 0)[::step].movedim(0, dim)
    y = linear(x.movedim(-dims - 1, -1)).movedim(-1, -dims - 1)
    return y if channels_last else y.contiguous()


def _is_channels_last(x: torch.Tensor, dims: int) -> bool:
    return not x.is_contiguous() and x.movedim(-dims - 1, -1).is_contiguous()


def prepared(
    x: torch.Tensor,
    p: float,
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    kernel: Sequence[int],
    padding_mode: str,
) -> tuple[torch.Tensor, torch.Tensor, int | str | Sequence[int]]:
    """x for the base and for A, dropped and padded, and the padding that is left to do."""
    dropped = F.dropout(x, p) if dropout_threshold(p) > 0 else x
    if padding_mode != "zeros":
        sides = _sides(padding, dilation, kernel)
        same = dropped is x
        x = F.pad(x, sides, mode=padding_mode)
        dropped = x if same else F.pad(dropped, sides, mode=padding_mode)
        padding = 0
    return x, dropped, padding


def updated(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    place: tuple[Any, ...],
    groups: int,
) -> torch.Tensor:
    """y + s B (x * A), for x as :func:`prepared` gives it; ``place`` is how a kernel moves."""
    dims = lora_a.dim() - 2
    convolve: Any = CONVOLUTIONS[dims + 2]
    s = convolve(x.to(lora_a.dtype), lora_a, None, *place)
    b = lora_b.flatten(1) * scaling.to(lora_b.dtype)
    return _add_update(y, s, b, groups, dims)


def _add_update(
    y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, groups: int, dims: int
) -> torch.Tensor:
    """y + B S, group by group; y (..., N, *size), S (..., R, *size), B (N, R / groups).

    The batched product adds while it multiplies, where y has the layout for it.
    """
    if y.dtype is not s.dtype or not y.is_contiguous():
        kernel = b.view(*b.shape, *(1,) * dims)
        return (y + CONVOLUTIONS[dims + 2](s, kernel, groups=groups)).to(y.dtype)
    n, r = b.shape
    size = y.shape[-dims:].numel()
    leading = y.shape[: -dims - 1]
    b = b.view(groups, n // groups, r).expand(*leading, -1, -1, -1).flatten(0, -3)
    update = s.reshape(b.shape[0], r, size)
    return torch.baddbmm(y.view(b.shape[0], n // groups, size), b, update).view(y.shape)


def each(value: int | Sequence[int], dims: int) -> list[int]:
    """One for every dimension, as torch's convolutions read it."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _sides(
    padding: int | str | Sequence[int], dilation: int | Sequence[int], kernel: Sequence[int]
) -> list[int]:
    """What F.pad takes: left and right of every dimension, the last first."""
    dims = len(kernel)
    dilations = each(dilation, dims)
    if padding == "valid":
        padding = 0
    sides: list[int] = []
    for i in reversed(range(dims)):
        if padding == "same":
            total = dilations[i] * (kernel[i] - 1)
            sides += [total // 2, total - total // 2]
        elif isinstance(padding, str):
            reject("lora_conv", "padding", "'same', 'valid' or sizes", repr(padding))
        else:
            sides += [each(padding, dims)[i]] * 2
    return sides


def expect_adapter(
    op: str,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    n: int,
    kernel: tuple[int, ...],
    groups: int,
) -> None:
    """A and B beside a convolution to N channels, A's kernel with the channels before it."""
    if lora_a.dim() != len(kernel) + 1 or lora_a.shape[1:] != kernel:
        expect_shape(op, "lora_a", lora_a, ("R", *kernel), "to match weight")
    r = lora_a.shape[0]
    if r < 1 or r % groups:
        reject(op, "lora_a", f"a rank of at least 1 and a multiple of groups = {groups}", r)
    if lora_b.dim() < 2 or lora_b.shape != (n, r // groups, *(1,) * (lora_b.dim() - 2)):
        expect_shape(op, "lora_b", lora_b, (n, r // groups), "to match weight and lora_a")
    expect_dtype(op, "lora_b", lora_b, (lora_a.dtype,), "to match lora_a")


def _expect_operands(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    p: float,
    groups: int,
    padding_mode: str,
) -> None:
    op = "lora_conv"
    expect_dense(op, None, x=x)
    expect_dense(op, x.device, weight=weight, lora_a=lora_a, lora_b=lora_b)
    if weight.dim() not in CONVOLUTIONS:
        reject(op, "weight", "shape (N, K / groups, *kernel)", tuple(weight.shape))
    if groups < 1 or weight.shape[0] % groups:
        reject(op, "groups", f"a divisor of {weight.shape[0]}", groups)
    n, k, kernel = weight.shape[0], weight.shape[1] * groups, weight.shape[2:]
    if x.dim() not in (weight.dim() - 1, weight.dim()):
        reject(op, "x", f"shape (..., {k}, *size)", tuple(x.shape), because="to match weight")
    expect_adapter(op, lora_a, lora_b, n, (k, *kernel), groups)
    if not torch.is_autocast_enabled(x.device.type):
        expect_dtype(op, "x", x, FLOATS)
        expect_dtype(op, "weight", weight, (x.dtype,), "to match x")
        expect_dtype(op, "lora_a", lora_a, (x.dtype, wide(x.dtype)), "beside x")
    if bias is not None:
        expect_dense(op, x.device, bias=bias)
        expect_shape(op, "bias", bias, (n,), "to match the rows of weight")
        expect_dtype(op, "bias", bias, (weight.dtype,), f"to match {name_of(weight.dtype)}")
    if not 0.0 <= p <= 1.0:
        reject(op, "p", "a probability", p)
    if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
        known = "'zeros', 'reflect', 'replicate' or 'circular'"
        reject(op, "padding_mode", known, repr(padding_mode))
