"""The ptq4 family on the native libraries, one file per op."""

from pyfastft.native.ptq4 import (
<<<<<<< HEAD
    dequantize,
    fake_quantize4,
    int8_linear,
    linear,
    lora_linear,
)

__all__ = ["dequantize", "fake_quantize4", "int8_linear", "linear", "lora_linear"]
=======
    fake_quantize4,
    int8_linear,
    quantize_weight,
)

__all__ = [
    "fake_quantize4",
    "int8_linear",
    "quantize_weight",
]
>>>>>>> 982245b (ptq4: QTensor4, formats, quantizers, 4-bit layers)
