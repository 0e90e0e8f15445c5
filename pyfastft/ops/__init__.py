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

__all__ = [
    "abs_row_sums",
    "abs_row_sums_backward",
    "dora_norm",
    "lora_adapters",
    "lora_adapters_backward",
    "lora_linear",
    "lora_linear_backward",
    "lora_projections",
    "lora_projections_backward",
    "scale_columns",
    "scale_columns_backward",
]
