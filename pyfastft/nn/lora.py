"""A linear layer with a low-rank adapter, over the parameters of the layer it stands in for."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyfastft import _native
from pyfastft._check import name_of
from pyfastft.functional import lora_linear, pack_weight, unpack_weight
from pyfastft.nn._layer import LoRALayer
from pyfastft.nn._made_of import MadeOf

__all__ = ["LoRALinear"]


@dataclasses.dataclass
class Packing(MadeOf):
    """How a layer's weight is packed, and its packed forms."""

    dx: bool
    replace: bool
    packed: torch.Tensor | None = None
    packed_dx: torch.Tensor | None = None

    def forget(self) -> None:
        """Drop the packed forms; how to pack is kept."""
        self.packed = self.packed_dx = self.weight = None


class LoRALinear(LoRALayer):
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

    def __init__(self, base: nn.Module, **options: Any) -> None:
        self._packing: Packing | None = None
        super().__init__(base, **options)

    @classmethod
    def kinds(cls) -> tuple[type[nn.Module], ...]:
        """``nn.Linear``, and Conv1D where transformers is loaded."""
        conv1d = _conv1d()
        return (nn.Linear,) if conv1d is None else (nn.Linear, conv1d)

    def _shapes(self, lora_bias: bool) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        self.fan_in_fan_out = is_conv1d(self.base)
        n, k = self.weight.T.shape if self.fan_in_fan_out else self.weight.shape
        self.in_features, self.out_features = k, n
        return (self.r, k), (n, self.r), n

    def _delta(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (b @ a).T if self.fan_in_fan_out else b @ a

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._plain_weight()
        return nn.functional.linear(x, weight.T if self.fan_in_fan_out else weight, self.bias)

    def _adapted(self, x: torch.Tensor, p: float) -> torch.Tensor:
        packed = packed_dx = None
        weight: torch.Tensor | None = self.weight
        if self._packing is not None:
            if self._may_use_packed(x):
                packed, packed_dx = self._packing.packed, self._packing.packed_dx
                weight = None if self._packing.replace else weight
            else:
                weight = self._plain_weight()
        if self.fan_in_fan_out and weight is not None:
            weight = weight.T
        return lora_linear(
            x,
            weight,
            self.lora_a,
            self.lora_b,
            bias=self._whole_bias(),
            scaling=self.scaling,
            p=p,
            packed=packed,
            packed_dx=packed_dx,
        )

    # -- the weight packed once --------------------------------------------------------------------

    @torch.no_grad()
    def pack(self, *, dx: bool = False, replace: bool = False) -> None:
        """Pack the frozen weight once, so that no call packs it again; on the CPU.

        A weight that was changed since is packed again by the next call, unless it was changed
        through ``.data``, which leaves no trace. Under ``torch.compile`` that is not looked at:
        pack again after changing the weight. Under autocast to another
        dtype the packed forms are not used. Moving the layer or changing its dtype packs again
        where that can be done, and ends it elsewhere.

        Args:
            dx: pack it for the gradient of the input, too; as much memory again.
            replace: keep the packed form alone. ``weight`` then is on the meta device, of its
                shape and dtype, and the state dict, merging, :meth:`restore` and :meth:`unpack`
                take it from the packed form, bit for bit. A pickle of the layer (not of its state
                dict) is for machines of the same instruction set.

        Raises:
            ValueError: the weight trains, is not on the CPU, is of a dtype that is not packed, or
                holds the adapter; or there is no CPU extension.
        """
        why = "the adapter is merged" if self.merged else self.why_not_packed()
        if why is not None:
            raise ValueError(f"LoRALinear: expected a weight that can be packed, {why}")
        self.unpack()
        self._packing = Packing(dx, replace)
        self._pack_again()

    def unpack(self) -> None:
        """Undo :meth:`pack`: the plain weight, bit for bit. Does nothing where none is packed."""
        self._bring_back()
        self._packing = None

    @property
    def packed(self) -> bool:
        """Whether :meth:`pack` was called."""
        return self._packing is not None

    def why_not_packed(self) -> str | None:
        """Why the weight cannot be packed; None where it can."""
        if self.weight.requires_grad:
            return "it trains"
        if self.weight.device.type != "cpu" and not self._is_replaced():
            return f"it is on {self.weight.device}"
        if self.weight.dtype not in _native.DTYPES:
            return f"it is of dtype {name_of(self.weight.dtype)}"
        return _native.why_no_cpu()

    def _is_replaced(self) -> bool:
        return self._packing is not None and self._packing.replace and self.weight.is_meta

    @torch.no_grad()
    def _pack_again(self) -> None:
        packing = self._packing
        assert packing is not None
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        packing.packed = pack_weight(weight)
        packing.packed_dx = pack_weight(weight, transposed=True) if packing.dx else None
        if packing.replace:
            self.take_over()
            meta = torch.empty_like(self.weight, device="meta")
            self._parameters["weight"] = nn.Parameter(meta, requires_grad=False)
        packing.note(self.weight)

    def _bring_back(self) -> None:
        """Put the plain weight in its place where it was replaced."""
        if self._is_replaced():
            assert self._packing is not None
            plain = self._plain_weight()
            self._parameters["weight"] = nn.Parameter(plain, requires_grad=False)
            self._packing.forget()

    def _plain_weight(self) -> torch.Tensor:
        if not self._is_replaced():
            return self.weight
        assert self._packing is not None
        assert self._packing.packed is not None
        n, k = self.out_features, self.in_features
        plain = unpack_weight(self._packing.packed, n, k, self.weight.dtype)
        return plain.T.contiguous() if self.fan_in_fan_out else plain

    def _may_use_packed(self, x: torch.Tensor) -> bool:
        """Whether the packed forms serve this call; packs again what is out of date."""
        assert self._packing is not None
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if kind != "cpu" or dtype is not self.weight.dtype:
            return False
        if self._packing.replace or torch.compiler.is_compiling():
            return self._packing.packed is not None
        if not self._packing.is_of(self.weight):
            self._packing.forget()
            if self.why_not_packed() is not None:
                return False
            self._pack_again()
        return not self.weight.requires_grad

    def merge(self, *, safe: bool = False) -> None:
        """Add the adapter to the weight, see :meth:`LoRALayer.merge`.

        A weight that :meth:`pack` replaced is there again until :meth:`unmerge`.
        """
        if self.merged:
            return
        self._bring_back()
        try:
            super().merge(safe=safe)
        finally:
            if not self.merged:
                self._replace_again()

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Does nothing where none is merged."""
        super().unmerge()
        self._replace_again()

    def restore(self) -> nn.Module:
        """The base layer, with the parameters as they are now; the adapter is left out."""
        self.unpack()
        return super().restore()

    def _replace_again(self) -> None:
        if self._packing is None or not self._packing.replace or self._is_replaced():
            return
        if self.why_not_packed() is None:
            self._pack_again()
        else:
            self._packing = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._bring_back()
        super()._apply(fn, recurse)
        if self._packing is not None:
            # The same Parameter may hold other data now, and its version be the same.
            self._packing.forget()
            if self.why_not_packed() is not None:
                self._packing = None
            elif not self.merged:
                self._replace_again()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_replaced():
            destination[f"{prefix}weight"] = self._plain_weight()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        self._bring_back()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if not self.merged:
            self._replace_again()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._packing is not None and not self._is_replaced():
            state["_packing"] = Packing(self._packing.dx, self._packing.replace)
        return state


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, which stores its weight as (K, N)."""
    conv1d = _conv1d()
    return conv1d is not None and isinstance(module, conv1d)


def _conv1d() -> type[nn.Module] | None:
    # Without transformers loaded there is none of them.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return getattr(transformers, "Conv1D", None)
