"""What all layers with a 4-bit weight share."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft._check import name_of
from pyfastft.functional import int4_dequantize
from pyfastft.nn._kept import KeptBuffers
from pyfastft.quantization.tensor import LAYOUT, TENSORS, QTensor4, read_layout

BUFFERS = (*TENSORS.values(), LAYOUT)


class Int4Weight(KeptBuffers):
    """Holds a :class:`pyfastft.quantization.QTensor4` as buffers of its tensors' names.

    ``layout`` (3) goes into the state dict beside them, so that a file says what it holds, and
    loading one of another layout, or with values that no weight has, is an error.
    """

    KEPT = BUFFERS

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    layout: torch.Tensor

    def _hold(self, weight: QTensor4, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        for field, name in TENSORS.items():
            self.register_buffer(name, getattr(weight, field))
        self.register_buffer(LAYOUT, weight.layout().to(weight.device))
        self.k, self.group_size, self.codebook = weight.k, weight.group_size, weight.codebook
        self._shape, self._dtype = torch.Size(shape), dtype

    @property
    def quantized(self) -> QTensor4:
        """The weight as it is held, a matrix; its values are checked, so not for every step."""
        fields: dict[str, Any] = {f: self._buffers[name] for f, name in TENSORS.items()}
        return QTensor4(
            **fields,
            k=self.k,
            group_size=self.group_size,
            codebook=self.codebook,
        )

    def expect_sound(self) -> None:
        """ValueError or TypeError unless the buffers hold a weight of the layer's layout."""
        self._expect_layout(self.layout)
        _ = self.quantized

    def _expect_layout(self, layout: torch.Tensor) -> None:
        mine, theirs = (self.k, self.group_size, self.codebook), read_layout(layout)
        if theirs != mine:
            raise ValueError(f"expected K, group size and codebook {mine}, got {theirs}")

    @property
    def weight(self) -> torch.Tensor:
        """W in the original's shape, made anew by every reading; it has no gradient."""
        return self._dense(self._dtype)

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        w = int4_dequantize(self.codes, self.scales, k=self.k, dtype=dtype, **self._operands())
        return w.view(self._shape)

    def _operands(self) -> dict[str, Any]:
        """What the ops take of the weight by name."""
        return {
            "zero": self.zeros,
            "perm": self.perm,
            "group_size": self.group_size,
            "codebook": self.codebook,
        }

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        given = {name: state_dict.get(f"{prefix}{name}") for name in BUFFERS}
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        try:
            if not any(tensor.is_meta for tensor in given.values()):
                if LAYOUT in given:
                    self._expect_layout(given[LAYOUT])
                if given.keys() == {n for n in BUFFERS if self._buffers[n] is not None}:
                    QTensor4.from_tensors(given)
        except (TypeError, ValueError) as error:
            lists[-1].append(f"{prefix.rstrip('.')}: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def _described(self) -> str:
        """The weight's part of ``extra_repr``."""
        zero = (
            "" if self.zeros is None else f", zero={str(self.zeros.dtype).removeprefix('torch.')}"
        )
        order = "" if self.perm is None else ", permuted"
        scale = name_of(self.scales.dtype)
        return f"{self.codebook}, group_size={self.group_size}, scale={scale}{zero}{order}"
