"""Contracts: per op its schema, its checks and allocation, and its ``autograd.Function``."""

from pyfastft.ops.lora import (
    abs_row_sums,
    abs_row_sums_backward,
    dora_norm,
    lora_adapters,
    lora_adapters_backward,
    lora_linear,
    lora_linear_backward,
    lora_projections,
    lora_projections_backward,
    scale_columns,
    scale_columns_backward,
)
from pyfastft.ops.ptq4 import (
    fake_quantize4,
    fake_quantize4_backward,
    int4_dequantize,
    int4_linear,
    int4_linear_backward,
    int4_lora_linear,
    int4_lora_linear_backward,
    int8_linear,
    int8_linear_backward,
)

__all__ = [
    "abs_row_sums",
    "abs_row_sums_backward",
    "dora_norm",
    "fake_quantize4",
    "fake_quantize4_backward",
    "int4_dequantize",
    "int4_linear",
    "int4_linear_backward",
    "int4_lora_linear",
    "int4_lora_linear_backward",
    "int8_linear",
    "int8_linear_backward",
    "lora_adapters",
    "lora_adapters_backward",
    "lora_linear",
    "lora_linear_backward",
    "lora_projections",
    "lora_projections_backward",
    "scale_columns",
    "scale_columns_backward",
]
