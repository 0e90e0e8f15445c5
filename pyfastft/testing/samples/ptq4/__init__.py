"""Samples of the ptq4 family, one file per op."""

from pyfastft.testing.samples.ptq4 import dequantize, linear, lora_linear

_FILES = (dequantize, linear, lora_linear)
SAMPLES = {op: build for file in _FILES for op, build in file.SAMPLES.items()}
REJECTS = {op: build for file in _FILES for op, build in file.REJECTS.items()}
