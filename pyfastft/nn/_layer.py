"""What all layers with a low-rank adapter share."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from pyfastft.nn._stand_in import StandIn, title, why_not_kind, why_not_weight


class LoRALayer(StandIn, abc.ABC):
    """A layer with a low-rank adapter; see :class:`pyfastft.nn.LoRALinear` for the arguments.

    ``weight`` and ``bias`` are the base layer's own Parameters under their own names, so the names
    in a model's state dict stay; ``lora_a``, ``lora_b`` and, where asked for, ``lora_bias`` come
    beside them. Whether the base trains is left to its ``requires_grad``.
    """

    KINDS: ClassVar[tuple[type[nn.Module], ...]]
    # How PEFT's files name A and B.
    FILE_NAMES: ClassVar[dict[str, str]] = {
        "lora_a": "lora_A.weight",
        "lora_b": "lora_B.weight",
        "lora_bias": "lora_B.bias",
    }

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_bias: nn.Parameter | None
    scaling: torch.Tensor

    def __init__(
        self,
        base: nn.Module,
        *,
        r: int,
        scale: float,
        dropout: float = 0.0,
        lora_bias: bool = False,
        init: str = "kaiming",
        adapter_dtype: str = "float32",
    ) -> None:
        super().__init__()
        why = self.why_not(base)
        if why is not None:
            kinds = " or ".join(map(title, self.kinds()))
            raise TypeError(f"{type(self).__name__}: expected base of type {kinds}, {why}")
        self._stand_in_for(base)
        self.r = r
        self.dropout = dropout
        self.init = init

        dtype, device = self._weight_kind()
        if adapter_dtype == "float32":
            dtype = torch.promote_types(dtype, torch.float32)
        a, b, n = self._shapes(lora_bias)
        self.lora_a = nn.Parameter(torch.empty(a, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(b, dtype=dtype, device=device))
        bias = nn.Parameter(torch.empty(n, dtype=dtype, device=device)) if lora_bias else None
        self.register_parameter("lora_bias", bias)
        self.reset_parameters()

        # A tensor, so that a compiled model need not be compiled again for another scale.
        self.register_buffer("scaling", None, persistent=False)
        self._scale = float(scale)
        self._rebuild_scaling()
        self.enabled = True
        self._original: dict[str, torch.Tensor] | None = None

    # -- what each kind of layer says of itself ----------------------------------------------------

    @classmethod
    def kinds(cls) -> tuple[type[nn.Module], ...]:
        """What this layer stands in for."""
        return cls.KINDS

    @abc.abstractmethod
    def _shapes(self, lora_bias: bool) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """The shapes of A and B, and the length of B's bias."""

    @abc.abstractmethod
    def _delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the weight, but for s."""

    @abc.abstractmethod
    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        """The base's own output."""

    @abc.abstractmethod
    def _adapted(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """The output with the adapter."""

    # -- what a layer whose weight is no parameter says otherwise ----------------------------------

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why this layer cannot stand in for the module; None where it can."""
        return why_not_kind(module, cls.kinds()) or why_not_weight(module)

    def _weight_kind(self) -> tuple[torch.dtype, torch.device]:
        """The dtype that the base computes in, and where its weight is."""
        return self.weight.dtype, self.weight.device

    def why_not_merged(self) -> str | None:
        """Why the adapter cannot be added to the weight; None where it can."""
        return None

    # ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the adapter anew; the base's parameters stay."""
        if self.init == "gaussian":
            nn.init.normal_(self.lora_a, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        if self.init == "random":
            nn.init.kaiming_uniform_(self.lora_b, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_b)
        if self.lora_bias is not None:
            bound = 1 / math.sqrt(self.lora_b.shape[1]) if self.init == "random" else 0.0
            nn.init.uniform_(self.lora_bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the class says, or the base's own output where merged or disabled."""
        if self.merged or not self.enabled:
            if self.merged and self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{type(self).__name__}: the adapter is merged into the weight and cannot "
                    "train, call unmerge() before training or eval() before inference"
                )
            return self._plain(x)
        return self._adapted(x, self.dropout if self.training else 0.0)

    def _whole_bias(self) -> torch.Tensor | None:
        """b + s * b_lora, rounded once to the base's dtype."""
        if self.lora_bias is None:
            return self.bias
        update = self.scaling * self.lora_bias
        dtype, _ = self._weight_kind()
        return (update if self.bias is None else self.bias + update).to(dtype)

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds the adapter too."""
        return self._original is not None

    @property
    def scale(self) -> float:
        """s. Setting it changes ``scaling`` in place."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if self.merged:
            raise RuntimeError(
                f"{type(self).__name__}: the adapter is merged, unmerge() before a new scale"
            )
        self._scale = float(value)
        self.scaling.fill_(self._scale)

    @torch.no_grad()
    def merge(self, *, safe: bool = False) -> None:
        """Add the adapter to the weight: computed in float32 (float64) and rounded once.

        A copy of the original stays in CPU memory until :meth:`unmerge`. Merging twice is merging
        once. While merged, the state dict holds the merged weight, and none can be loaded.

        Args:
            safe: raise ValueError, and change nothing, where the result is not finite.
        """
        if self.merged:
            return
        kind = type(self).__name__
        if why := self.why_not_merged():
            raise ValueError(f"{kind}: {why}")
        if self.lora_bias is not None and self.bias is None:
            raise ValueError(f"{kind}: a base without a bias cannot hold the adapter's bias")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = self._delta(self.lora_a.to(wide), self.lora_b.to(wide))
        merged = {"weight": torch.add(self.weight.to(wide), delta, alpha=self._scale)}
        if self.lora_bias is not None:
            assert self.bias is not None
            merged["bias"] = self.bias.to(wide) + self._scale * self.lora_bias.to(wide)
        merged = {name: value.to(self.weight.dtype) for name, value in merged.items()}
        for name, value in merged.items():
            if safe and not torch.isfinite(value).all():
                raise ValueError(f"{kind}: the merged {name} is not finite")
        self._original = {name: getattr(self, name).to("cpu", copy=True) for name in merged}
        for name, value in merged.items():
            getattr(self, name).copy_(value)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Does nothing where none is merged."""
        for name, value in (self._original or {}).items():
            getattr(self, name).copy_(value)
        self._original = None

    def restore(self) -> nn.Module:
        """The base layer, with the parameters as they are now; the adapter is left out."""
        self.unmerge()
        return super().restore()

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in PEFT's files."""
        parameters = {file: getattr(self, name) for name, file in self.FILE_NAMES.items()}
        return {file: p for file, p in parameters.items() if p is not None}

    def _rebuild_scaling(self) -> None:
        dtype, device = self._weight_kind()
        dtype = torch.promote_types(dtype, torch.float32)
        self.scaling = torch.full((), self._scale, dtype=dtype, device=device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # half() and its like mean the parameters; to_empty() leaves no value.
        self._rebuild_scaling()
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            lists[-1].append(f"{prefix}weight: the adapter is merged, unmerge() before loading")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def extra_repr(self) -> str:
        """The base's own description, and the adapter's."""
        own = f"r={self.r}, scale={self._scale:g}, dropout={self.dropout:g}, merged={self.merged}"
        return ", ".join(filter(None, (self.base.extra_repr(), own)))
