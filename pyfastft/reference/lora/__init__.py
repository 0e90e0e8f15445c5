"""The lora family's truth, one file per op. Symbols as in ``ops/lora.md``."""

from pyfastft.reference.lora import abs_row_sums, adapters, dora, linear, projections

__all__ = ["abs_row_sums", "adapters", "dora", "linear", "projections"]
