"""The ptq4 family on Triton, one module per op; importing the family registers them."""

<<<<<<< HEAD
from pyfastft.triton_kernels.ptq4 import (
    fake_quantize4,
    int8_linear,
)

__all__ = ["fake_quantize4", "int8_linear"]
=======
from pyfastft.triton_kernels.ptq4 import dequantize, linear, lora_linear

__all__ = ["dequantize", "linear", "lora_linear"]
>>>>>>> abe1292 (4-bit weights in Triton, the engines of int4_linear on a GPU)
