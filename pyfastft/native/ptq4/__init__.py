"""The ptq4 family on the native libraries, one file per op."""

from pyfastft.native.ptq4 import fake_quantize4, int8_linear

__all__ = ["fake_quantize4", "int8_linear"]
