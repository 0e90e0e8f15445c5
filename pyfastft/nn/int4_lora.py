"""Layers with a low-rank adapter over a 4-bit weight (QLoRA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyfastft.functional import int4_conv, int4_linear, int4_lora_conv, int4_lora_linear
from pyfastft.nn._int4_weight import BUFFERS, Int4Weight
from pyfastft.nn._layer import LoRALayer
from pyfastft.nn._stand_in import why_not_kind
from pyfastft.nn.conv import LoRAConv
from pyfastft.nn.int4 import Int4Conv1d, Int4Conv2d, Int4Conv3d, Int4Linear

__all__ = ["LoRAInt4Conv1d", "LoRAInt4Conv2d", "LoRAInt4Conv3d", "LoRAInt4Linear"]


class _OverInt4(Int4Weight, LoRALayer):  # type: ignore[misc]
    """Takes the base's buffers instead of a weight that is a parameter."""

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why this layer cannot stand in for the module; None where it can."""
        return why_not_kind(module, cls.kinds())

    def _adopt(self, base: nn.Module) -> None:
        assert isinstance(base, Int4Weight)
        self._base_names = ("bias",)
        for name in BUFFERS:
            self.register_buffer(name, base._buffers[name])
        self.k, self.group_size, self.codebook = base.k, base.group_size, base.codebook
        self._shape, self._dtype = base._shape, base._dtype
        self.register_parameter("bias", base._parameters["bias"])

    def _weight_kind(self) -> tuple[torch.dtype, torch.device]:
        return self._dtype, self.codes.device

    def why_not_merged(self) -> str | None:
        """The sum would have to be rounded to 4 bits again, and the update be lost in that."""
        return (
            "its weight is in 4 bits, which would round most of the update away; "
            "dequantize the model first"
        )

    def take_over(self) -> None:
        """Leave the base no tensors of its own until :meth:`restore`, only a view of these."""
        super().take_over()
        self.base.__dict__["_buffers"] = self._buffers

    def restore(self) -> nn.Module:
        """The base layer, with the tensors as they are now; the adapter is left out."""
        base = super().restore()
        assert isinstance(base, Int4Weight)
        base.__dict__["_buffers"] = {n: self._buffers[n] for n in BUFFERS}
        base._dtype = self._dtype
        return base

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._rebuild_scaling()  # now that the dtype is known
        return self


class LoRAInt4Linear(_OverInt4):  # type: ignore[misc]
    r"""A 4-bit linear layer with a low-rank adapter, in one op (QLoRA).

    .. math:: y = x W^T + b + s \cdot (\mathrm{dropout}_p(x) A^T B^T + b_{lora})

    W stays in its codes, which are this layer's buffers under the base's own names; a gradient
    goes to x, the adapter and the biases. Arguments as of :class:`LoRALinear`. It cannot be merged:
    :func:`pyfastft.dequantize` makes a model's weights dense first.
    """

    KINDS = (Int4Linear,)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why this layer cannot stand in for the module; None where it can."""
        if (why := super().why_not(module)) is not None:
            return why
        assert isinstance(module, Int4Linear)
        if module.activations is None:
            return None
        return f"its activations are rounded to {module.activations}, which adapters do not do"

    def _shapes(self, lora_bias: bool) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        n, k = self._shape
        self.in_features, self.out_features = k, n
        return (self.r, k), (n, self.r), n

    def _delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return b @ a

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        return int4_linear(x, self.codes, self.scales, bias=self.bias, **self._operands())

    def _adapted(self, x: torch.Tensor, p: float) -> torch.Tensor:
        return int4_lora_linear(
            x,
            self.codes,
            self.scales,
            self.lora_a,
            self.lora_b,
            bias=self._whole_bias(),
            scaling=self.scaling,
            p=p,
            **self._operands(),
        )


class _LoRAInt4Conv(_OverInt4, LoRAConv):  # type: ignore[misc]
    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        return int4_conv(
            x,
            self.codes,
            self.scales,
            kernel_size=self._shape[2:],
            bias=self.bias,
            **self._operands(),
            **self.options,
        )

    def _adapted(self, x: torch.Tensor, p: float) -> torch.Tensor:
        return int4_lora_conv(
            x,
            self.codes,
            self.scales,
            self.lora_a,
            self.lora_b,
            bias=self._whole_bias(),
            scaling=self.scaling,
            p=p,
            **self._operands(),
            **self.options,
        )


class LoRAInt4Conv1d(_LoRAInt4Conv):
    """A 4-bit ``nn.Conv1d`` with a low-rank adapter, see
    :func:`pyfastft.functional.int4_lora_conv` and :class:`LoRAInt4Linear`."""

    KINDS = (Int4Conv1d,)


class LoRAInt4Conv2d(_LoRAInt4Conv):
    """A 4-bit ``nn.Conv2d`` with a low-rank adapter, see :class:`LoRAInt4Conv1d`."""

    KINDS = (Int4Conv2d,)


class LoRAInt4Conv3d(_LoRAInt4Conv):
    """A 4-bit ``nn.Conv3d`` with a low-rank adapter, see :class:`LoRAInt4Conv1d`."""

    KINDS = (Int4Conv3d,)
