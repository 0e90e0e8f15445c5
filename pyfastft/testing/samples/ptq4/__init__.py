"""Samples of the ptq4 family, one file per op."""

from pyfastft.testing.samples.ptq4 import (
    dequantize,
    fake_quantize4,
    int8_linear,
    linear,
    lora_linear,
    quantize_weight,
)

_FILES = (
    dequantize,
    fake_quantize4,
    int8_linear,
    linear,
    lora_linear,
    quantize_weight,
)
SAMPLES = {op: build for file in _FILES for op, build in file.SAMPLES.items()}
REJECTS = {op: build for file in _FILES for op, build in file.REJECTS.items()}
