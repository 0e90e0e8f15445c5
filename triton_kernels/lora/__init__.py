"""The lora family on Triton, one module per op; importing the family registers them."""

from pyfastft.triton_kernels.lora import abs_row_sums, adapters, dora, linear, projections

__all__ = ["abs_row_sums", "adapters", "dora", "linear", "projections"]
