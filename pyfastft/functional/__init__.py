"""The ops as functions: defaults filled in, and only what users want returned."""

from pyfastft.functional.activations import (
    fake_quantize4,
    int4_conv2d_a4,
    int4_linear_a4,
    int4_linear_a8,
)
from pyfastft.functional.conv import lora_conv
from pyfastft.functional.dora import dora_linear, dora_norm, scale_columns
from pyfastft.functional.embedding import lora_embedding
from pyfastft.functional.int4 import int4_dequantize, int4_linear, int4_lora_linear
from pyfastft.functional.int4_conv import int4_conv, int4_lora_conv
from pyfastft.functional.int8 import int8_linear
from pyfastft.functional.linear import lora_linear, pack_weight, unpack_weight
from pyfastft.functional.masked import (
    masked_gather,
    masked_linear,
    masked_merge,
    masked_scatter_,
    masked_weight_grad,
    select_topk,
)
from pyfastft.functional.prune import block_sparse_linear
from pyfastft.functional.quantize_weight import hqq_quantize, rtn_quantize
from pyfastft.functional.several import lora_adapters, lora_projections
from pyfastft.functional.sums import abs_row_sums

__all__ = [
    "abs_row_sums",
    "block_sparse_linear",
    "dora_linear",
    "dora_norm",
    "fake_quantize4",
    "hqq_quantize",
    "int4_conv",
    "int4_conv2d_a4",
    "int4_dequantize",
    "int4_linear",
    "int4_linear_a4",
    "int4_linear_a8",
    "int4_lora_conv",
    "int4_lora_linear",
    "int8_linear",
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
    "rtn_quantize",
    "scale_columns",
    "select_topk",
    "unpack_weight",
]
