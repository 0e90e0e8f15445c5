"""The masked family on Triton, one module per op; importing the family registers them."""

from pyfastft.triton_kernels.masked import entries, select, step, weight_grad

__all__ = ["entries", "select", "step", "weight_grad"]
