"""The ptq4 family on the native libraries, one file per op; ``_cuda`` has them on CUDA."""

from pyfastft.native.ptq4 import (
    _cuda,
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
    "_cuda",
    "dequantize",
    "fake_quantize4",
    "int4_linear_a4",
    "int4_linear_a8",
    "int8_linear",
    "linear",
    "lora_linear",
    "quantize_weight",
]
