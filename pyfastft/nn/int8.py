"""A linear layer whose weight has 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyfastft._check import expect_dense, expect_dtype, expect_shape, name_of, reject
from pyfastft.functional import int8_linear
from pyfastft.nn._kept import KeptBuffers
from pyfastft.nn._stand_in import HOOKS, why_not_kind, why_not_weight
from pyfastft.ops.lora._operands import wide

__all__ = ["Int8Linear"]

_NAME = "Int8Linear"
_LARGEST = 127


class Int8Linear(KeptBuffers):
    r"""A linear layer over an int8 weight with one scale per output, see
    :func:`pyfastft.functional.int8_linear`: for the layers of a model that 4 bits would cost too
    much.

    .. math:: y = x W^T + b, \quad W_{nk} = s_n c_{nk}

    The weight is frozen: a gradient goes to x and to the bias. ``weight`` reads W. ``codes`` and
    ``scales`` are buffers, in the state dict, and stay as they are whatever dtype the module is
    cast to; loading others, or scales that are not finite, is an error. No adapter stands over it.

    Args:
        codes: c (N, K), int8.
        scales: s (N,), float32, finite.
        bias: b (N,), a Parameter that is kept as it is, or None.
        dtype: of the weight before it was quantized; the bias's or float32 where absent. The
            output has x's dtype.

    Shape:
        x (..., K) to y (..., N).

    Raises:
        ValueError, TypeError: an argument does not fit.
    """

    KEPT = ("codes", "scales")

    codes: torch.Tensor
    scales: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _expect_weight(codes, scales)
        expect_dense(_NAME, codes.device, scales=scales)
        self.out_features, self.in_features = codes.shape
        if bias is not None:
            expect_shape(_NAME, "bias", bias, (self.out_features,), "to match the rows of codes")
        self.register_buffer("codes", codes.detach().contiguous())
        self.register_buffer("scales", scales.detach().contiguous())
        self.register_parameter("bias", bias)
        self._dtype = dtype or (torch.float32 if bias is None else bias.dtype)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        r"""Round a layer's weight to the nearest codes; with its bias, hooks and mode. The layer
        itself stays as it is.

        .. math:: s_n = \max_k |W_{nk}| / 127, \quad c_{nk} = \mathrm{round}(W_{nk} / s_n)

        Args:
            linear: an nn.Linear of floats.

        Raises:
            TypeError: it is none, or has a forward or a kind of weight of its own.
            ValueError: a weight is not finite, beyond float32, or on the meta device.
        """
        if why := why_not_kind(linear, (nn.Linear,)) or why_not_weight(linear):
            raise TypeError(f"{_NAME}: expected linear of type nn.Linear, {why}")
        if linear.weight.is_meta:
            reject(_NAME, "weight", "values", "the meta device")
        codes, scales = _round(linear.weight)
        layer = cls(codes, scales, linear.bias, dtype=linear.weight.dtype)
        for hooks in HOOKS:
            layer.__dict__[hooks] = linear.__dict__[hooks]
        return layer.train(linear.training)

    @property
    def weight(self) -> torch.Tensor:
        """W, made anew by every reading; it has no gradient."""
        dtype = wide(self._dtype)
        return (self.codes.to(dtype) * self.scales.to(dtype)[:, None]).to(self._dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return int8_linear(x, self.codes, self.scales.to(wide(x.dtype)), bias=self.bias)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        given = {name: state_dict.get(f"{prefix}{name}", getattr(self, name)) for name in self.KEPT}
        try:
            _expect_weight(**given)
        except (TypeError, ValueError) as error:
            lists[-1].append(f"{prefix.rstrip('.')}: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={name_of(self._dtype)}"
        )


def _round(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of a weight."""
    w = weight.to(wide(weight.dtype))
    largest = w.abs().amax(1) if w.shape[1] else w.new_zeros(w.shape[0])
    scales = (largest / _LARGEST).float()
    if not bool(torch.isfinite(scales).all()):
        reject(_NAME, "weight", "finite values of float32's range", "another")
    # A row of zeros has a scale of 0. One of float32's smallest numbers has a scale rounded so far
    # that a quotient may pass the largest code.
    divisors = torch.where(scales > 0, scales, 1).to(w.dtype)
    codes = (w / divisors[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return codes.to(torch.int8), scales


def _expect_weight(codes: torch.Tensor, scales: torch.Tensor) -> None:
    expect_dense(_NAME, None, codes=codes, scales=scales)
    expect_dtype(_NAME, "codes", codes, (torch.int8,))
    expect_shape(_NAME, "codes", codes, ("N", "K"))
    expect_dtype(_NAME, "scales", scales, (torch.float32,))
    expect_shape(_NAME, "scales", scales, (codes.shape[0],), "to match the rows of codes")
    if not scales.is_meta and not bool(torch.isfinite(scales).all()):
        reject(_NAME, "scales", "finite values", "a NaN or an infinity")
