"""An embedding with a low-rank adapter."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pyfastft.functional import lora_embedding
from pyfastft.nn._layer import LoRALayer

__all__ = ["LoRAEmbedding"]

_OPTIONS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class LoRAEmbedding(LoRALayer):
    r"""``nn.Embedding`` with a low-rank adapter, see :func:`pyfastft.functional.lora_embedding`.

    .. math:: y = E_i + s \cdot A_{:, i}^T B^T

    ``lora_a`` (R, V) starts as zero and ``lora_b`` (D, R) normal, or both normal where ``init`` is
    ``"random"``. Arguments as of :class:`LoRALinear`; nothing is dropped, and there is no
    ``lora_bias``. With ``max_norm``, what is merged is what the tables hold, not limited again.
    """

    KINDS = (nn.Embedding,)
    FILE_NAMES: ClassVar[dict[str, str]] = {
        "lora_a": "lora_embedding_A",
        "lora_b": "lora_embedding_B",
    }

    def _shapes(self, lora_bias: bool) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        if lora_bias:
            raise ValueError("LoRAEmbedding: expected lora_bias of False, an embedding has none")
        self.options: dict[str, Any] = {name: getattr(self.base, name) for name in _OPTIONS}
        v, d = self.weight.shape
        return (self.r, v), (d, self.r), d

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the adapter anew; the base's table stays."""
        nn.init.normal_(self.lora_b)
        if self.init == "random":
            nn.init.normal_(self.lora_a)
        else:
            nn.init.zeros_(self.lora_a)

    def _delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (b @ a).T

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(x, self.weight, **self.options)

    def _adapted(self, x: torch.Tensor, p: float) -> torch.Tensor:
        return lora_embedding(
            x, self.weight, self.lora_a, self.lora_b, scaling=self.scaling, **self.options
        )
