"""Layers whose weights have 4 bits."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from pyfastft.functional import int4_conv, int4_linear
from pyfastft.nn._int4_weight import Int4Weight
from pyfastft.nn.lora import LoRALinear
from pyfastft.quantization.tensor import QTensor4

__all__ = ["Int4Conv1d", "Int4Conv2d", "Int4Conv3d", "Int4Linear"]

_CONV_OPTIONS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "transposed",
    "output_padding",
    "_reversed_padding_repeated_twice",
)


class Int4Linear(Int4Weight):
    r"""A linear layer over a 4-bit weight, see :func:`pyfastft.functional.int4_linear`.

    .. math:: y = x W^T + b

    The weight is frozen: a gradient goes to x and to the bias. ``weight`` reads W as a matrix.

    Args:
        weight: W (N, K).
        bias: b (N,), a Parameter that is kept as it is, or None.
        dtype: of the weight before it was quantized; the bias's or float32 where absent. The
            output has x's dtype.

    Shape:
        x (..., K) to y (..., N).

    Raises:
        ValueError, TypeError: an argument does not fit.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: QTensor4,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _expect_bias(self, weight, bias)
        self.in_features, self.out_features = weight.k, weight.n
        self._hold(weight, tuple(weight.shape), _dtype_of(bias, dtype))
        self.register_parameter("bias", bias)

    @classmethod
    def from_module(cls, module: nn.Module, weight: QTensor4) -> Int4Linear:
        """In the place of an nn.Linear or Conv1D, with its bias."""
        original: Any = module
        return cls(weight, module._parameters.get("bias"), dtype=original.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return int4_linear(x, self.codes, self.scales, bias=self.bias, **self._operands())

    def extra_repr(self) -> str:
        """Sizes and the weight's kind."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._described()}"


class _Int4Conv(Int4Weight):
    KIND: ClassVar[type[nn.Module]]

    bias: nn.Parameter | None

    def __init__(self, module: nn.Module, weight: QTensor4) -> None:
        super().__init__()
        if not isinstance(module, self.KIND):
            name = type(self).__name__
            raise TypeError(
                f"{name}: expected module of type nn.{self.KIND.__name__}, "
                f"got {type(module).__name__}"
            )
        original: Any = module
        shape = tuple(original.weight.shape)
        if tuple(weight.shape) != (shape[0], math.prod(shape[1:])):
            raise ValueError(
                f"{type(self).__name__}: expected weight of shape "
                f"({shape[0]}, {math.prod(shape[1:])}), got {tuple(weight.shape)}"
            )
        for name in _CONV_OPTIONS:
            setattr(self, name, getattr(module, name))
        self._hold(weight, shape, original.weight.dtype)
        self.register_parameter("bias", module._parameters.get("bias"))

    @classmethod
    def from_module(cls, module: nn.Module, weight: QTensor4) -> _Int4Conv:
        """In the place of the convolution, with its bias."""
        return cls(module, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return int4_conv(
            x,
            self.codes,
            self.scales,
            kernel_size=self._shape[2:],
            bias=self.bias,
            **self._operands(),
            **conv_options(self),
        )

    def extra_repr(self) -> str:
        """The convolution's own description, and the weight's kind."""
        kind: Any = self.KIND
        return f"{kind.extra_repr(self)}, {self._described()}"


class Int4Conv1d(_Int4Conv):
    r"""``nn.Conv1d`` over a 4-bit weight.

    .. math:: y = x * W + b

    W (N, C / groups, \*kernel) is a matrix of N rows in codes, of which panels are made dense in
    x's dtype at every call and in its backward, see :func:`pyfastft.functional.int4_conv`. It is
    frozen: a gradient goes to x and to the bias.

    Args:
        module: the convolution to stand in for: its options, and its bias, which is kept.
        weight: W as (N, C / groups times the kernel).

    Raises:
        ValueError, TypeError: an argument does not fit.
    """

    KIND = nn.Conv1d


class Int4Conv2d(_Int4Conv):
    """``nn.Conv2d`` over a 4-bit weight, see :class:`Int4Conv1d`."""

    KIND = nn.Conv2d


class Int4Conv3d(_Int4Conv):
    """``nn.Conv3d`` over a 4-bit weight, see :class:`Int4Conv1d`."""

    KIND = nn.Conv3d


def conv_options(module: nn.Module) -> dict[str, Any]:
    """How a convolution moves, as the functions take it."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(module, name) for name in names}


_CONVS: tuple[type[_Int4Conv], ...] = (Int4Conv1d, Int4Conv2d, Int4Conv3d)


def int4_layer_for(module: nn.Module) -> type[Int4Linear] | type[_Int4Conv] | None:
    """The 4-bit layer that stands in for modules of this kind, if one does."""
    if isinstance(module, LoRALinear.kinds()):
        return Int4Linear
    return next((layer for layer in _CONVS if isinstance(module, layer.KIND)), None)


def _expect_bias(layer: nn.Module, weight: QTensor4, bias: nn.Parameter | None) -> None:
    name = type(layer).__name__
    if not isinstance(weight, QTensor4):
        raise TypeError(f"{name}: expected weight of type QTensor4, got {type(weight).__name__}")
    if bias is not None and tuple(bias.shape) != (weight.n,):
        raise ValueError(f"{name}: expected bias of shape ({weight.n},), got {tuple(bias.shape)}")


def _dtype_of(bias: nn.Parameter | None, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return torch.float32 if bias is None else bias.dtype
