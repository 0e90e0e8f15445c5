"""Samples of the ptq4 family, one file per op."""

from pyfastft.testing.samples.ptq4 import (
    dequantize,
    fake_quantize4,
    int4_linear_a4,
    int4_linear_a8,
    int8_linear,
    linear,
    lora_linear,
    quantize_weight,
)

_FILES = (
    dequantize,
    linear,
    lora_linear,
    quantize_weight,
    int8_linear,
    fake_quantize4,
    int4_linear_a8,
    int4_linear_a4,
)
SAMPLES = {op: build for file in _FILES for op, build in file.SAMPLES.items()}
REJECTS = {op: build for file in _FILES for op, build in file.REJECTS.items()}
