"""The ptq4 family on the native libraries, one file per op."""

from pyfastft.native.ptq4 import (
    dequantize,
    fake_quantize4,
    int8_linear,
    linear,
    lora_linear,
    quantize_weight,
)

__all__ = [
    "dequantize",
    "fake_quantize4",
    "int8_linear",
    "linear",
    "lora_linear",
    "quantize_weight",
]
