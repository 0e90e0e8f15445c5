"""The modules of a model: which of them were changed, and others put in their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from pyfastft.nn._layer import LoRALayer
from pyfastft.nn.masked import MaskedLinear


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """The model's adapted layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module


def expect_unconverted(model: nn.Module, caller: str) -> None:
    """ValueError where a module has an adapter, or trains in part, already."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            raise ValueError(f"{caller}: the model has adapters already ({name}), revert it first")
        if isinstance(module, MaskedLinear):
            raise ValueError(
                f"{caller}: the model trains in part already ({name}), revert it first"
            )


def replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules where the old ones stand, wherever that is."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
