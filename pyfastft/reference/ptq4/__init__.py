"""The ptq4 family's truth, one file per op. Symbols as in ``ops/ptq4.md``."""

from pyfastft.reference.ptq4 import dequantize, linear, lora_linear

__all__ = ["dequantize", "linear", "lora_linear"]
