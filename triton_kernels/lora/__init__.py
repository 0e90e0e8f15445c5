"""The lora family on Triton, one module per op; importing the family registers them."""

from pyfastft.triton_kernels.lora import adapters, dora, linear, projections

__all__ = ["adapters", "dora", "linear", "projections"]
