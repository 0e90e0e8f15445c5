"""The lora family on the native libraries, one file per op."""

from pyfastft.native.lora import linear

__all__ = ["linear"]
