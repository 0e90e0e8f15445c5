"""The lora family on the native libraries, one file per op."""

from pyfastft.native.lora import _cuda_lists, abs_row_sums, adapters, dora, linear, projections

__all__ = ["_cuda_lists", "abs_row_sums", "adapters", "dora", "linear", "projections"]
