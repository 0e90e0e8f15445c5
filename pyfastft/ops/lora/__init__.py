"""The lora family's contracts, one file per op. The derivation is in ``../lora.md``."""

from pyfastft.ops.lora.abs_row_sums import (
    AbsRowSumsFunction,
    abs_row_sums,
    abs_row_sums_backward,
)
from pyfastft.ops.lora.adapters import lora_adapters, lora_adapters_backward
from pyfastft.ops.lora.dora import (
    ScaleColumnsFunction,
    dora_norm,
    scale_columns,
    scale_columns_backward,
)
from pyfastft.ops.lora.linear import LoRALinearFunction, lora_linear, lora_linear_backward
from pyfastft.ops.lora.projections import lora_projections, lora_projections_backward

__all__ = [
    "AbsRowSumsFunction",
    "LoRALinearFunction",
    "ScaleColumnsFunction",
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
