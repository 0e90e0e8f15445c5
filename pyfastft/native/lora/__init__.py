"""The lora family on the native libraries, one file per op."""

from pyfastft.native.lora import abs_row_sums, adapters, dora, linear, projections

__all__ = ["abs_row_sums", "adapters", "dora", "linear", "projections"]
