"""The ops as functions: defaults filled in, and only what users want returned."""

from pyfastft.functional.conv import lora_conv
from pyfastft.functional.dora import dora_linear, dora_norm, scale_columns
from pyfastft.functional.embedding import lora_embedding
from pyfastft.functional.int4 import int4_dequantize, int4_linear, int4_lora_linear
from pyfastft.functional.linear import lora_linear, pack_weight, unpack_weight
from pyfastft.functional.masked import (
    masked_gather,
    masked_linear,
    masked_merge,
    masked_scatter_,
    masked_weight_grad,
    select_topk,
)
from pyfastft.functional.several import lora_adapters, lora_projections
from pyfastft.functional.sums import abs_row_sums

__all__ = [
    "abs_row_sums",
    "dora_linear",
    "dora_norm",
    "int4_dequantize",
    "int4_linear",
    "int4_lora_linear",
    "lora_adapters",
    "lora_conv",
    "lora_embedding",
    "lora_linear",
    "lora_projections",
    "masked_gather",
    "masked_linear",
    "masked_merge",
    "masked_scatter_",
    "masked_weight_grad",
    "pack_weight",
    "scale_columns",
    "select_topk",
    "unpack_weight",
]
