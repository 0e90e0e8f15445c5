"""A layer over the parameters of another one, in whose place it stands."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pyfastft._check import FLOATS, name_of

# Shared with the base layer, so that handles of hooks registered before still remove them.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class StandIn(nn.Module):
    """What such layers share; a subclass takes the base's parameters in :meth:`_adopt`."""

    _base_names: tuple[str, ...]

    def _stand_in_for(self, base: nn.Module) -> None:
        """Take the base's parameters, hooks and mode."""
        # Not a submodule: its parameters would appear a second time, under other names.
        self.__dict__["_base"] = base
        self._adopt(base)
        for name in HOOKS:
            self.__dict__[name] = base.__dict__[name]
        self.train(base.training)

    def _adopt(self, base: nn.Module) -> None:
        """Take the base's own parameters."""
        self._base_names = tuple(base._parameters)
        self.register_parameter("weight", base._parameters["weight"])
        self.register_parameter("bias", base._parameters.get("bias"))

    @property
    def base(self) -> nn.Module:
        """The layer that this one stands in for."""
        return self.__dict__["_base"]

    def take_over(self) -> None:
        """Leave the base no parameters of its own until :meth:`restore`, only a view of these.

        What replaces parameters (a move from the meta device, sharding) then reaches both, and
        nothing keeps the replaced ones alive.
        """
        self.base.__dict__["_parameters"] = self._parameters

    def restore(self) -> nn.Module:
        """The base layer, with the parameters as they are now."""
        kept = {name: self._parameters[name] for name in self._base_names}
        self.base.__dict__["_parameters"] = kept
        return self.base.train(self.training)


def why_not_kind(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> str | None:
    """Why the module does not compute as one of these kinds; None where it does."""
    kind = type(module)
    known = next((k for k in kinds if isinstance(module, k)), None)
    if known is None:
        return f"{kind.__name__} is no {' or '.join(map(title, kinds))}"
    if kind.forward is not known.forward or "forward" in vars(module):
        return f"{kind.__name__} has a forward of its own"
    return None


def why_not_weight(module: nn.Module) -> str | None:
    """Why the module's weight is none to stand in for; None where it is."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"its weight is no plain Parameter but {type(module.weight).__name__}"
    if weight.dtype not in FLOATS:
        return f"its weight is of dtype {name_of(weight.dtype)}"
    return None


def title(kind: type[nn.Module]) -> str:
    """A class as users know it: ``nn.Linear``."""
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
