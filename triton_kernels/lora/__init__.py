"""The lora family on Triton, one module per op; importing the family registers them."""

from pyfastft.triton_kernels.lora import linear

__all__ = ["linear"]
