"""The ptq4 family's contracts, one file per op. The derivation is in ``../ptq4.md``."""

from pyfastft.ops.ptq4.dequantize import int4_dequantize
from pyfastft.ops.ptq4.linear import Int4LinearFunction, int4_linear, int4_linear_backward
from pyfastft.ops.ptq4.lora_linear import (
    Int4LoRALinearFunction,
    int4_lora_linear,
    int4_lora_linear_backward,
)

__all__ = [
    "Int4LinearFunction",
    "Int4LoRALinearFunction",
    "int4_dequantize",
    "int4_linear",
    "int4_linear_backward",
    "int4_lora_linear",
    "int4_lora_linear_backward",
]
