"""Convolutions with a low-rank adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyfastft.functional import lora_conv
from pyfastft.nn._layer import LoRALayer

__all__ = ["LoRAConv1d", "LoRAConv2d", "LoRAConv3d"]


class LoRAConv(LoRALayer):
    """What the convolutions share; the kind of base makes the difference."""

    def _shapes(self, lora_bias: bool) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        base = self.base
        self.options: dict[str, Any] = {
            name: getattr(base, name)
            for name in ("stride", "padding", "dilation", "groups", "padding_mode")
        }
        groups = self.options["groups"]
        if self.r % groups:
            raise ValueError(
                f"{type(self).__name__}: expected r of a multiple of groups = {groups}, "
                f"got {self.r}"
            )
        n, k, *kernel = self.weight.shape
        return (self.r, k * groups, *kernel), (n, self.r // groups, *[1] * len(kernel)), n

    def _delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.options["groups"] > 1:
            raise ValueError(
                f"{type(self).__name__}: the weight has groups = {self.options['groups']}, and the "
                "adapter reaches over them; it cannot be merged"
            )
        return (b.flatten(1) @ a.flatten(1)).view_as(self.weight)

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        base: Any = self.base
        return base._conv_forward(x, self.weight, self.bias)

    def _adapted(self, x: torch.Tensor, p: float) -> torch.Tensor:
        bias = self._whole_bias()
        return lora_conv(
            x,
            self.weight,
            self.lora_a,
            self.lora_b,
            bias=bias,
            scaling=self.scaling,
            p=p,
            **self.options,
        )


class LoRAConv1d(LoRAConv):
    r"""``nn.Conv1d`` with a low-rank adapter, see :func:`pyfastft.functional.lora_conv`.

    .. math:: y = x * W + b + s \cdot (B\, (\mathrm{dropout}_p(x) * A) + b_{lora})

    A (R, K, \*kernel) moves as W does, by its stride, padding, dilation and padding mode;
    B (N, R / groups, 1, ..). Arguments as of :class:`LoRALinear`; R must be a multiple of groups,
    and a layer with groups cannot be merged. PEFT's A has neither dilation nor padding mode.
    """

    KINDS = (nn.Conv1d,)


class LoRAConv2d(LoRAConv):
    """``nn.Conv2d`` with a low-rank adapter, see :class:`LoRAConv1d`."""

    KINDS = (nn.Conv2d,)


class LoRAConv3d(LoRAConv):
    """``nn.Conv3d`` with a low-rank adapter, see :class:`LoRAConv1d`."""

    KINDS = (nn.Conv3d,)
