"""Convolutions whose weights have 4 bits, alone and with a low-rank update.

W is brought out of its codes in panels of bounded size, each for torch's convolution, in the
forward and again in the backward: what is saved are the codes, which are the layer's own. A kernel
of 1 without groups is the linear op over the channels, for which W is never made dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pyfastft import ops
from pyfastft._check import expect_dense, reject
from pyfastft.functional._arguments import as_scaling
from pyfastft.functional.conv import (
    CONVOLUTIONS,
    each,
    expect_adapter,
    is_pointwise,
    over_channels,
    prepared,
    updated,
)
from pyfastft.functional.int4 import int4_linear, int4_lora_linear
from pyfastft.ops.lora._operands import wide


def int4_conv(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    kernel_size: Sequence[int],
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    perm: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    group_size: int,
    codebook: str = "int4",
) -> torch.Tensor:
    r"""A convolution of one, two or three dimensions whose weight has 4 bits.

    .. math:: y = x * W + b

    Args:
        x: input of shape (..., C, \*size), with or without a batch dimension.
        codes, scale, zero, perm, group_size, codebook: W of shape (N, C / groups, \*kernel_size) as
            the matrix ``W.flatten(1)``, see :func:`int4_dequantize`.
        kernel_size: one size for each dimension; how many there are says which convolution it is.
        bias: b of shape (N,), of x's dtype.
        stride, padding, dilation, groups: as of :func:`torch.nn.functional.conv2d`.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Returns:
        y of x's dtype and of the shape that the convolution with W gives.

    Raises:
        ValueError: a shape, device, size or codebook does not fit, or perm is no permutation; what
            torch's convolution refuses, stride and padding among it, is a RuntimeError of torch's.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.

    Note:
        Gradients go to x and the bias, and where they are asked for to the scale and a float zero.
        W is rounded to x's dtype, a panel of at most 16 MiB (or 64 rows) at a time, and saved
        nowhere; x is saved for the gradients of scale and zero alone, with which the convolution
        cannot be differentiated twice. A kernel of 1 without groups and padding is
        :func:`int4_linear` over the channels, which never can.

    Reference:
        Frantar et al. 2023, "GPTQ", section 3, of convolutions as matrices.
    """
    dims = _expect("int4_conv", x, kernel_size, groups)
    x, bias = _cast(x, bias)
    weight = {"zero": zero, "perm": perm, "group_size": group_size, "codebook": codebook}
    if is_pointwise(kernel_size, padding, groups):
        linear = partial(int4_linear, codes=codes, scale=scale, bias=bias)
        return over_channels(x, stride, dims, partial(linear, **weight))
    x, _, padding = prepared(x, 0.0, padding, dilation, kernel_size, padding_mode)
    place = (stride, padding, dilation)
    return _convolved(x, codes, scale, bias, tuple(kernel_size), place, groups, weight)


def int4_lora_conv(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scaling: float | torch.Tensor = 1.0,
    p: float = 0.0,
    perm: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    group_size: int,
    codebook: str = "int4",
) -> torch.Tensor:
    r"""A low-rank update beside a convolution whose weight has 4 bits.

    .. math:: y = x * W + b + s \cdot B\, (\mathrm{dropout}_p(x) * A)

    Args:
        x, codes, scale, zero, bias, perm, stride, padding, dilation, groups, padding_mode,
            group_size, codebook: as of :func:`int4_conv`; W's kernel is A's.
        lora_a, lora_b, scaling, p: as of :func:`lora_conv`.

    Returns:
        y of x's dtype and of the shape that the convolution with W gives.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`int4_conv` and :func:`lora_conv`.

    Note:
        Gradients go to x, A, B, the bias and s, and where they are asked for to the scale and a
        float zero.

    Reference:
        Dettmers et al. 2023, "QLoRA", equation 5, of convolutions as PEFT has them.
    """
    op = "int4_lora_conv"
    expect_dense(op, None, lora_a=lora_a)
    kernel = tuple(lora_a.shape[2:])
    dims = _expect(op, x, kernel, groups)
    expect_dense(op, x.device, codes=codes, lora_a=lora_a, lora_b=lora_b)
    expect_adapter(op, lora_a, lora_b, len(codes), (x.shape[-dims - 1], *kernel), groups)
    x, bias = _cast(x, bias)
    weight = {"zero": zero, "perm": perm, "group_size": group_size, "codebook": codebook}
    if is_pointwise(kernel, padding, groups):
        linear = partial(int4_lora_linear, codes=codes, scale=scale, bias=bias)
        factors = {"lora_a": lora_a.flatten(1), "lora_b": lora_b.flatten(1)}
        linear = partial(linear, **factors, scaling=scaling, p=p)
        return over_channels(x, stride, dims, partial(linear, **weight))
    x, dropped, padding = prepared(x, p, padding, dilation, kernel, padding_mode)
    place = (stride, padding, dilation)
    y = _convolved(x, codes, scale, bias, kernel, place, groups, weight)
    return updated(y, dropped, lora_a, lora_b, as_scaling(scaling, x), place, groups)


def _cast(x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What autocast asks of a convolution; W is made in x's dtype."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return x, bias


def _expect(op: str, x: torch.Tensor, kernel: Sequence[int], groups: int) -> int:
    """The number of dimensions."""
    expect_dense(op, None, x=x)
    dims = len(kernel)
    if dims + 2 not in CONVOLUTIONS:
        reject(op, "kernel_size", "one to three sizes", tuple(kernel))
    if x.dim() not in (dims + 1, dims + 2):
        reject(op, "x", "shape (..., C, *size)", tuple(x.shape), because=f"for {dims} dimensions")
    if groups < 1 or x.shape[-dims - 1] % groups:
        reject(op, "groups", f"a divisor of {x.shape[-dims - 1]}", groups)
    return dims


def _convolved(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: tuple[int, ...],
    place: tuple[Any, ...],
    groups: int,
    weight: dict[str, Any],
) -> torch.Tensor:
    dims = len(kernel)
    stride, padding, dilation = place
    if padding == "same":
        sides = [step * (size - 1) for step, size in zip(each(dilation, dims), kernel, strict=True)]
        left = [side // 2 for side in sides]
        if any(side % 2 for side in sides):
            # What is left over goes to the right, as torch does it.
            pads = [(a, side - a) for a, side in zip(left, sides, strict=True)]
            x = F.pad(x, [side for pair in reversed(pads) for side in pair])
            left = [0] * dims
        padding = left
    elif padding == "valid":
        padding = 0
    place = (each(stride, dims), each(padding, dims), each(dilation, dims))
    batched = x if x.dim() == dims + 2 else x[None]
    zero = weight["zero"]
    trained = scale.requires_grad or (zero is not None and zero.requires_grad)
    operands = (codes, scale, zero, weight["perm"])
    y = (_TrainedInt4Convolution if trained else _Int4Convolution).apply(
        *(batched, *operands, bias, kernel, place, groups),
        *(weight["group_size"], weight["codebook"]),
    )
    return y if batched is x else y[0]


class _Panel:
    """Some rows of W, the channels of x that they see, and in how many groups."""

    def __init__(self, first: int, count: int, channels: slice, groups: int) -> None:
        self.rows, self.channels, self.groups = slice(first, first + count), channels, groups


def _panels(n: int, channels: int, k: int, groups: int, itemsize: int) -> Iterator[_Panel]:
    """W (N, K) in panels of bounded size: all of it where it is that small, else rows of a group.
    The channels are those of x."""
    from pyfastft.triton_kernels import _int4_engine  # importing pyfastft loads no kernels

    width = _int4_engine.panel_width(n, k, itemsize)
    if width >= n:
        yield _Panel(0, n, slice(0, channels), groups)
        return
    of_group, seen = n // groups, channels // groups
    for group in range(groups):
        sees = slice(group * seen, (group + 1) * seen)
        for first in range(0, of_group, width):
            yield _Panel(group * of_group + first, min(width, of_group - first), sees, 1)


class _Int4Convolution(torch.autograd.Function):
    """y = x * W + b over panels of W; x has a batch dimension."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        perm: torch.Tensor | None,
        bias: torch.Tensor | None,
        kernel: tuple[int, ...],
        place: tuple[list[int], ...],
        groups: int,
        group_size: int,
        codebook: str,
    ) -> torch.Tensor:
        convolve: Any = CONVOLUTIONS[x.dim()]
        parts = [
            convolve(
                x[:, panel.channels],
                w,
                None if bias is None else bias[panel.rows],
                *place,
                panel.groups,
            )
            for panel, w in _dense(
                x.shape, x.dtype, codes, scale, zero, perm, kernel, groups, group_size, codebook
            )
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, codes, scale, zero, perm, _, kernel, place, groups, group_size, codebook = inputs
        _, _, needs_scale, needs_zero, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_scale or needs_zero else None, codes, scale, zero, perm)
        ctx.shape, ctx.place = x.shape, place
        ctx.rest = (kernel, groups, group_size, codebook)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, grad)


class _TrainedInt4Convolution(_Int4Convolution):
    """The same where a gradient of the scales or zero-points is asked for: W, made anew in the
    backward, has no derivative by them, so it is differentiated once."""

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients of what the convolution took, None where not asked for."""
    needs_x, _, needs_scale, needs_zero, _, needs_bias, *_ = ctx.needs_input_grad
    x, codes, scale, zero, perm = ctx.saved_tensors
    _, _, group_size, codebook = ctx.rest
    stride, padding, dilation = ctx.place
    shape, dims = ctx.shape, len(ctx.shape) - 2
    dx = dscale = dzero = dbias = None
    of_weight: list[tuple[torch.Tensor, torch.Tensor]] = []
    if needs_x or x is not None:
        for panel, w in _dense(shape, grad.dtype, codes, scale, zero, perm, *ctx.rest):
            seen = (shape[0], w.shape[1] * panel.groups, *shape[2:])
            # For dX the shape of x is read and nothing else.
            read = grad.new_empty(1).expand(seen) if x is None else x[:, panel.channels]
            part, dw, _ = torch.ops.aten.convolution_backward(
                *(grad[:, panel.rows], read, w, None),
                *(stride, padding, dilation, False, [0] * dims, panel.groups),
                [needs_x, x is not None, False],
            )
            if x is not None:
                rows = panel.rows
                held = (codes[rows], scale[rows], None if zero is None else zero[rows], perm)
                of_weight.append(_of_groups(dw.flatten(1), *held, group_size, codebook))
            if not needs_x:
                continue
            if len(w) == len(codes):
                dx = part
                break
            # Sums of several panels are rounded once.
            if dx is None:
                dx = grad.new_zeros(shape, dtype=wide(grad.dtype))
            dx[:, panel.channels] += part
        dx = None if dx is None else dx.to(grad.dtype)
    if needs_scale:
        dscale = torch.cat([of_scale for of_scale, _ in of_weight])
    if needs_zero:
        dzero = torch.cat([of_zero for _, of_zero in of_weight])
    if needs_bias:
        dbias = grad.sum([0, *range(2, grad.dim())])
    return dx, None, dscale, dzero, None, dbias, None, None, None, None, None


def _of_groups(
    dw: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    group_size: int,
    codebook: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of scale and zero from that of some rows of W: sums over the groups of
    dW (c - z), and of -s dW, in at least float32."""
    dw = dw.to(wide(dw.dtype))
    dw = dw if perm is None else dw.index_select(1, perm)
    k = dw.shape[1]
    whole = (k, group_size, codebook, dw.dtype)
    by_scale = ops.int4_dequantize(codes, torch.ones_like(scale), zero, None, *whole)
    size = min(group_size, k)
    sums = [
        F.pad(each_of, (0, -k % size)).unflatten(1, (-1, size)).sum(2)
        for each_of in (dw * by_scale, dw)
    ]
    return sums[0].to(scale.dtype), (-scale * sums[1]).to(scale.dtype)


def _dense(
    shape: torch.Size,
    dtype: torch.dtype,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    kernel: tuple[int, ...],
    groups: int,
    group_size: int,
    codebook: str,
) -> Iterator[tuple[_Panel, torch.Tensor]]:
    """W's panels for an x of that shape, one at a time."""
    channels = shape[1] // groups
    n, k = codes.shape[0], channels * math.prod(kernel)
    for panel in _panels(n, shape[1], k, groups, dtype.itemsize):
        rows = panel.rows
        w = ops.int4_dequantize(
            *(codes[rows], scale[rows], None if zero is None else zero[rows], perm),
            *(k, group_size, codebook, dtype),
        )
        yield panel, w.view(-1, channels, *kernel)
