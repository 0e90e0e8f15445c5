"""The ptq4 family's truth, one file per op. Symbols as in ``ops/ptq4.md``."""

from pyfastft.reference.ptq4 import (
    dequantize,
    fake_quantize4,
    int4_linear_a4,
    int4_linear_a8,
    int8_linear,
    linear,
    lora_linear,
    quantize_weight,
)

__all__ = [
    "dequantize",
    "fake_quantize4",
    "int4_linear_a4",
    "int4_linear_a8",
    "int8_linear",
    "linear",
    "lora_linear",
    "quantize_weight",
]
