"""Layers that stand in for those of a pretrained model."""

from pyfastft.nn.lora import LoRALinear, disable_adapters

__all__ = ["LoRALinear", "disable_adapters"]
