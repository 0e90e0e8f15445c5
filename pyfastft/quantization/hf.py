"""transformers' ``from_pretrained(..., quantization_config=...)``, by its public registries.

Importing this module registers both ends, so it must be imported before a folder that was saved in
4 bits is loaded:

    from pyfastft.quantization.hf import PTQ4Config
    model = AutoModel.from_pretrained(folder, quantization_config=PTQ4Config(group_size=64))
    model.save_pretrained(other)
    AutoModel.from_pretrained(other)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyfastft.config import PTQ4
from pyfastft.nn.int4 import int4_layer_for
from pyfastft.quantization.model import (
    Quantization,
    as_matrix,
    dequantize,
    install,
    quantize,
    remember,
)
from pyfastft.quantization.tensor import QTensor4

__all__ = ["PTQ4Config", "PTQ4Quantizer"]

METHOD = "pyfastft"
_FIELDS = tuple(field.name for field in dataclasses.fields(PTQ4))


@register_quantization_config(METHOD)
class PTQ4Config(QuantizationConfigMixin):
    """A :class:`pyfastft.PTQ4` as transformers' configs are.

    Args:
        modules: the modules in 4 bits, which a saved model's config names; absent, those that the
            targets mean are quantized.
        **fields: of :class:`pyfastft.PTQ4`.

    Raises:
        ValueError, TypeError: a field does not fit; the message begins with its name.
    """

    def __init__(self, modules: list[str] | None = None, **fields: Any) -> None:
        fields.pop("quant_method", None)
        self.quant_method: Any = METHOD
        config = PTQ4.from_dict(fields)
        for name, value in config.to_dict().items():
            setattr(self, name, value)
        self.modules = modules

    @property
    def config(self) -> PTQ4:
        """The config as the rest of the package takes it."""
        return PTQ4.from_dict({name: getattr(self, name) for name in _FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return {"quant_method": METHOD, "modules": self.modules, **self.config.to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: what a default is may change."""
        return self.to_dict()


@register_quantizer(METHOD)
class PTQ4Quantizer(HfQuantizer):
    """Quantizes a model that was loaded, or builds the 4-bit layers that a saved one's tensors go
    into."""

    requires_calibration = False
    quantization_config: PTQ4Config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        named = dict(model.named_modules())
        weights = {}
        for name in self.quantization_config.modules or ():
            if name not in named or int4_layer_for(named[name]) is None:
                raise ValueError(f"modules: expected layers of the model, got {name!r}")
            weights[name] = _empty(named[name], self.quantization_config.config)
        install(model, weights, activations=self.quantization_config.config.activations)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            report = quantize(model, self.quantization_config.config)
            self.quantization_config.modules = list(report.changed)
            return model
        named = dict(model.named_modules())
        for name in self.quantization_config.modules or ():
            layer: Any = named[name]
            try:
                layer.expect_sound()
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from None
        remember(model, Quantization(self.quantization_config.config))
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize(model, dtype=dtype)
        return model

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers compile whole."""
        return True

    def is_serializable(self, **kwargs: Any) -> bool:
        """All is in the state dict and the config."""
        return True


def _empty(module: nn.Module, config: PTQ4) -> QTensor4:
    """A weight of the shapes and dtypes that the config makes of the module's, without values."""
    n, k = as_matrix(module).shape
    group_size = max(k, 1) if config.group_size == -1 else config.group_size
    grid = (n, -(-k // group_size))
    stored = torch.bfloat16 if config.scale_dtype == "bfloat16" else torch.float32
    zero = None
    if config.method == "hqq":
        zero = torch.empty(grid, dtype=torch.uint8 if config.round_zero else stored, device="meta")
    elif config.codebook == "int4" and not config.symmetric:
        zero = torch.empty(grid, dtype=torch.uint8, device="meta")
    return QTensor4(
        codes=torch.empty(n, -(-k // 2), dtype=torch.uint8, device="meta"),
        scale=torch.empty(grid, dtype=stored, device="meta"),
        zero=zero,
        k=k,
        group_size=group_size,
        codebook=config.codebook,
    )
