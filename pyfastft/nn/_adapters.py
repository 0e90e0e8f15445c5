"""Which layer stands in for which, and all adapted layers of a model at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from pyfastft.nn._layer import LoRALayer
from pyfastft.nn.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from pyfastft.nn.embedding import LoRAEmbedding
from pyfastft.nn.int4_lora import (
    LoRAInt4Conv1d,
    LoRAInt4Conv2d,
    LoRAInt4Conv3d,
    LoRAInt4Linear,
)
from pyfastft.nn.lora import LoRALinear

LAYERS: tuple[type[LoRALayer], ...] = (
    LoRALinear,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAEmbedding,
    LoRAInt4Linear,
    LoRAInt4Conv1d,
    LoRAInt4Conv2d,
    LoRAInt4Conv3d,
)


def layer_for(module: nn.Module) -> type[LoRALayer] | None:
    """The layer that stands in for modules of this kind, if one does."""
    return next((layer for layer in LAYERS if isinstance(module, layer.kinds())), None)


def why_not(module: nn.Module) -> str | None:
    """Why no layer can stand in for this module; None where one can."""
    layer = layer_for(module)
    if layer is None:
        return f"{type(module).__name__} is no linear layer, convolution or embedding"
    return layer.why_not(module)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context every adapted layer of the model computes as its base does.

    Merged adapters are unmerged meanwhile.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
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
