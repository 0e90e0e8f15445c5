"""Samples of the lora family, one file per op."""

from pyfastft.testing.samples.lora import abs_row_sums, adapters, dora, linear, projections

_FILES = (linear, projections, adapters, dora, abs_row_sums)
SAMPLES = {op: build for file in _FILES for op, build in file.SAMPLES.items()}
REJECTS = {op: build for file in _FILES for op, build in file.REJECTS.items()}
