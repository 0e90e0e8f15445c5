"""The masked family on the native libraries, one file per op."""

from pyfastft.native.masked import entries, select, step, weight_grad

__all__ = ["entries", "select", "step", "weight_grad"]
