"""Layers whose weights have 4 bits."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from pyfastft._codebook import ACTIVATIONS
from pyfastft.functional import int4_conv, int4_linear, int4_linear_a8
from pyfastft.nn._int4_weight import Int4Weight
from pyfastft.nn.lora import LoRALinear
from pyfastft.ops.ptq4.int4_linear_a8 import MOST_OF_GROUP
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

    With ``activations="int8"`` x is rounded to 8 bits on the way, see
    :func:`pyfastft.functional.int4_linear_a8`. The output is the same in training and evaluation,
    with a gradient and without; the gradient is that of the layer without rounding, straight
    through it. It is a setting of the layer, and not in its state dict: weights go from a layer
    that rounds into one that does not, and back. No adapter stands over such a layer.

    Args:
        weight: W (N, K).
        bias: b (N,), a Parameter that is kept as it is, or None.
        dtype: of the weight before it was quantized; the bias's or float32 where absent. The
            output has x's dtype.
        activations: None, or ``"int8"``, beside a weight of the codebook int4.

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
        activations: Literal["int8"] | None = None,
    ) -> None:
        super().__init__()
        _expect_bias(self, weight, bias)
        self._activations = _rounding(type(self), weight, activations)
        self.in_features, self.out_features = weight.k, weight.n
        self._hold(weight, tuple(weight.shape), _dtype_of(bias, dtype))
        self.register_parameter("bias", bias)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        weight: QTensor4,
        *,
        activations: Literal["int8"] | None = None,
    ) -> Int4Linear:
        """In the place of an nn.Linear or Conv1D, with its bias."""
        original: Any = module
        bias = module._parameters.get("bias")
        return cls(weight, bias, dtype=original.weight.dtype, activations=activations)

    @staticmethod
    def why_not_rounded(k: int, group_size: int, codebook: str) -> str | None:
        """Why activations cannot be rounded beside such a weight; None where they can."""
        if codebook != "int4":
            return f"activations are rounded beside codes of int4, not of {codebook}"
        if min(k, group_size) > MOST_OF_GROUP:
            return f"a group of more than {MOST_OF_GROUP} products of bytes has no sum in 32 bits"
        return None

    @property
    def activations(self) -> Literal["int8"] | None:
        """What x is rounded to; None where it is not."""
        return self._activations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        if self._activations is None:
            return int4_linear(x, self.codes, self.scales, bias=self.bias, **self._operands())
        return int4_linear_a8(
            x,
            self.codes,
            self.scales,
            zero=self.zeros,
            bias=self.bias,
            perm=self.perm,
            group_size=self.group_size,
        )

    def extra_repr(self) -> str:
        """Sizes and the weight's kind."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        rounded = "" if self._activations is None else f", activations={self._activations}"
        return f"{sizes}, bias={self.bias is not None}, {self._described()}{rounded}"


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

    @staticmethod
    def why_not_rounded(k: int, group_size: int, codebook: str) -> str | None:
        """Why activations cannot be rounded beside such a weight."""
        return "a convolution's activations are not rounded"

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


def _rounding(
    kind: type[Int4Linear], weight: QTensor4, activations: Literal["int8"] | None
) -> Literal["int8"] | None:
    if activations is None:
        return None
    if activations not in ACTIVATIONS:
        known = " or ".join(map(repr, (None, *ACTIVATIONS)))
        raise ValueError(f"{kind.__name__}: expected activations of {known}, got {activations!r}")
    if why := kind.why_not_rounded(weight.k, weight.group_size, weight.codebook):
        raise ValueError(f"{kind.__name__}: expected activations of None, {why}")
    return activations


def _dtype_of(bias: nn.Parameter | None, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return torch.float32 if bias is None else bias.dtype
