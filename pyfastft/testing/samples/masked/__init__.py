"""Samples of the masked family, one file per op."""

from pyfastft.testing.samples.masked import entries, select, step, weight_grad

_FILES = (entries, weight_grad, select, step)
SAMPLES = {op: build for file in _FILES for op, build in file.SAMPLES.items()}
REJECTS = {op: build for file in _FILES for op, build in file.REJECTS.items()}
