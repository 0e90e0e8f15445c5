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
from pyfastft.ops.masked import (
    masked_adamw_,
    masked_gather,
    masked_lion_,
    masked_merge,
    masked_scatter_,
    masked_sgd_,
    masked_weight_grad,
    select_topk,
)
from pyfastft.ops.ptq4 import (
    int4_dequantize,
    int4_linear,
    int4_linear_backward,
    int4_lora_linear,
    int4_lora_linear_backward,
)

__all__ = [
    "abs_row_sums",
    "abs_row_sums_backward",
    "dora_norm",
    "int4_dequantize",
    "int4_linear",
    "int4_linear_backward",
    "int4_lora_linear",
    "int4_lora_linear_backward",
    "lora_adapters",
    "lora_adapters_backward",
    "lora_linear",
    "lora_linear_backward",
    "lora_projections",
    "lora_projections_backward",
    "masked_adamw_",
    "masked_gather",
    "masked_lion_",
    "masked_merge",
    "masked_scatter_",
    "masked_sgd_",
    "masked_weight_grad",
    "scale_columns",
    "scale_columns_backward",
    "select_topk",
]
