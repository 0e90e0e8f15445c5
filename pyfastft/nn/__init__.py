"""Layers that stand in for those of a pretrained model."""

from pyfastft.nn._adapters import disable_adapters
from pyfastft.nn._made_of import RowSquares
from pyfastft.nn.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from pyfastft.nn.embedding import LoRAEmbedding
from pyfastft.nn.lora import LoRALinear

__all__ = [
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALinear",
    "RowSquares",
    "disable_adapters",
]
