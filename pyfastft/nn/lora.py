"""A linear layer with a low-rank adapter, over the parameters of the layer it stands in for."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pyfastft._check import FLOATS, name_of
from pyfastft.functional import lora_linear

__all__ = ["LoRALinear", "disable_adapters"]

# Shared with the base layer, so that handles of hooks registered before still remove them.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class LoRALinear(nn.Module):
    r"""``nn.Linear`` or transformers' ``Conv1D`` with a low-rank adapter.

    .. math:: y = x W^T + b + s \cdot (\mathrm{dropout}_p(x) A^T B^T + b_{lora})

    ``weight`` and ``bias`` are the base layer's own Parameters under their own names, so the names
    in a model's state dict stay; ``lora_a`` (R, K), ``lora_b`` (N, R) and, where asked for,
    ``lora_bias`` (N,) come beside them. Whether the base trains is left to its ``requires_grad``.

    Args:
        base: the layer to stand in for; it is kept, and :meth:`restore` gives it back.
        r: the adapter's rank R.
        scale: s.
        dropout: p, applied to the adapter's input while training.
        lora_bias: give the adapter a bias.
        init: ``"kaiming"``, ``"gaussian"`` or ``"random"``, see :class:`pyfastft.LoRA`.
        adapter_dtype: ``"float32"`` (float64 beside float64) or ``"base"``.

    Shape:
        x (..., K) to y (..., N), both of the base's dtype.

    Raises:
        TypeError: the base cannot be stood in for; says why.
        RuntimeError: a training forward while the adapter is merged.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
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
        why = why_not(base)
        if why is not None:
            raise TypeError(f"LoRALinear: expected base of type nn.Linear or Conv1D, {why}")
        # Not a submodule: its parameters would appear a second time, under other names.
        self.__dict__["_base"] = base
        self.fan_in_fan_out = is_conv1d(base)
        self.register_parameter("weight", base._parameters["weight"])
        self.register_parameter("bias", base._parameters["bias"])
        n, k = self.weight.T.shape if self.fan_in_fan_out else self.weight.shape
        self.in_features, self.out_features, self.r = k, n, r
        self.dropout = dropout
        self.init = init

        dtype, device = self.weight.dtype, self.weight.device
        if adapter_dtype == "float32":
            dtype = torch.promote_types(dtype, torch.float32)
        self.lora_a = nn.Parameter(torch.empty(r, k, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(n, r, dtype=dtype, device=device))
        bias = nn.Parameter(torch.empty(n, dtype=dtype, device=device)) if lora_bias else None
        self.register_parameter("lora_bias", bias)
        self.reset_parameters()

        # A tensor, so that a compiled model need not be compiled again for another scale.
        self.register_buffer("scaling", None, persistent=False)
        self._scale = float(scale)
        self._rebuild_scaling()
        self.enabled = True
        self._original: dict[str, torch.Tensor] | None = None
        for name in _HOOKS:
            self.__dict__[name] = base.__dict__[name]
        self.train(base.training)

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
            bound = 1 / math.sqrt(self.r) if self.init == "random" else 0.0
            nn.init.uniform_(self.lora_bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        if self.merged or not self.enabled:
            if self.merged and self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "LoRALinear: the adapter is merged into the weight and cannot train, "
                    "call unmerge() before training or eval() before inference"
                )
            return nn.functional.linear(x, weight, self.bias)
        return lora_linear(
            x,
            weight,
            self.lora_a,
            self.lora_b,
            bias=self._whole_bias(),
            scaling=self.scaling,
            p=self.dropout if self.training else 0.0,
        )

    def _whole_bias(self) -> torch.Tensor | None:
        """b + s * b_lora, rounded once to the base's dtype."""
        if self.lora_bias is None:
            return self.bias
        update = self.scaling * self.lora_bias
        return (update if self.bias is None else self.bias + update).to(self.weight.dtype)

    @property
    def base(self) -> nn.Module:
        """The layer that this one stands in for."""
        return self.__dict__["_base"]

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
            raise RuntimeError("LoRALinear: the adapter is merged, unmerge() before a new scale")
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
        if self.lora_bias is not None and self.bias is None:
            raise ValueError("LoRALinear: a base without a bias cannot hold the adapter's bias")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        a, b = self.lora_a.to(wide), self.lora_b.to(wide)
        merged = {"weight": torch.addmm(weight.to(wide), b, a, alpha=self._scale)}
        if self.fan_in_fan_out:
            merged["weight"] = merged["weight"].T
        if self.lora_bias is not None:
            assert self.bias is not None
            merged["bias"] = self.bias.to(wide) + self._scale * self.lora_bias.to(wide)
        merged = {name: value.to(self.weight.dtype) for name, value in merged.items()}
        for name, value in merged.items():
            if safe and not torch.isfinite(value).all():
                raise ValueError(f"LoRALinear: the merged {name} is not finite")
        self._original = {name: getattr(self, name).to("cpu", copy=True) for name in merged}
        for name, value in merged.items():
            getattr(self, name).copy_(value)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Does nothing where none is merged."""
        for name, value in (self._original or {}).items():
            getattr(self, name).copy_(value)
        self._original = None

    def take_over(self) -> None:
        """Leave the base no parameters of its own until :meth:`restore`, only a view of these.

        What replaces parameters (a move from the meta device, sharding) then reaches both, and
        nothing keeps the replaced ones alive.
        """
        self.base.__dict__["_parameters"] = self._parameters

    def restore(self) -> nn.Module:
        """The base layer, with the parameters as they are now; the adapter is left out."""
        self.unmerge()
        kept = {name: self._parameters[name] for name in ("weight", "bias")}
        self.base.__dict__["_parameters"] = kept
        return self.base.train(self.training)

    def _rebuild_scaling(self) -> None:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.scaling = torch.full((), self._scale, dtype=dtype, device=self.weight.device)

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
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, scale={self._scale:g}, "
            f"dropout={self.dropout:g}, merged={self.merged}"
        )


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context every :class:`LoRALinear` of the model computes as its base does.

    Merged adapters are unmerged meanwhile.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    before = [(layer, layer.enabled, layer.merged) for layer in layers]
    try:
        for layer in layers:
            layer.unmerge()
            layer.enabled = False
        yield
    finally:
        for layer, enabled, merged in before:
            layer.enabled = enabled
            if merged:
                layer.merge()


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, which stores its weight as (K, N)."""
    conv1d = _conv1d()
    return conv1d is not None and isinstance(module, conv1d)


def _conv1d() -> type[nn.Module] | None:
    # Without transformers loaded there is none of them.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return getattr(transformers, "Conv1D", None)


def why_not(module: nn.Module) -> str | None:
    """Why :class:`LoRALinear` cannot stand in for this module; None where it can."""
    kind = type(module)
    known = next((k for k in (nn.Linear, _conv1d()) if k and isinstance(module, k)), None)
    if known is None:
        return f"{kind.__name__} is neither nn.Linear nor Conv1D"
    if kind.forward is not known.forward or "forward" in vars(module):
        return f"{kind.__name__} has a forward of its own"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"its weight is no plain Parameter but {type(module.weight).__name__}"
    if weight.dtype not in FLOATS:
        return f"its weight is of dtype {name_of(weight.dtype)}"
    return None
