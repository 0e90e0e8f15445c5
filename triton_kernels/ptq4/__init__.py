"""The ptq4 family on Triton, one module per op; importing the family registers them."""

from pyfastft.triton_kernels.ptq4 import (
    dequantize,
    fake_quantize4,
    int4_linear_a4,
    int4_linear_a8,
    int8_linear,
    linear,
    lora_linear,
)

__all__ = [
    "dequantize",
    "fake_quantize4",
    "int4_linear_a4",
    "int4_linear_a8",
    "int8_linear",
    "linear",
    "lora_linear",
]
