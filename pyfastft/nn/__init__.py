"""Layers that stand in for those of a pretrained model."""

from pyfastft.nn._adapters import disable_adapters
from pyfastft.nn._made_of import RowSquares
from pyfastft.nn.block_sparse import BlockSparseLinear
from pyfastft.nn.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from pyfastft.nn.embedding import LoRAEmbedding
from pyfastft.nn.int4 import Int4Conv1d, Int4Conv2d, Int4Conv3d, Int4Linear
from pyfastft.nn.int4_lora import (
    LoRAInt4Conv1d,
    LoRAInt4Conv2d,
    LoRAInt4Conv3d,
    LoRAInt4Linear,
)
from pyfastft.nn.int8 import Int8Linear
from pyfastft.nn.lora import LoRALinear
from pyfastft.nn.masked import MaskedLinear

__all__ = [
    "BlockSparseLinear",
    "Int4Conv1d",
    "Int4Conv2d",
    "Int4Conv3d",
    "Int4Linear",
    "Int8Linear",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRAInt4Conv1d",
    "LoRAInt4Conv2d",
    "LoRAInt4Conv3d",
    "LoRAInt4Linear",
    "LoRALinear",
    "MaskedLinear",
    "RowSquares",
    "disable_adapters",
]
