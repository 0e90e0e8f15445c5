"""The ptq4 family's contracts, one file per op. The derivation is in ``../ptq4.md``."""

from pyfastft.ops.ptq4.dequantize import int4_dequantize
from pyfastft.ops.ptq4.fake_quantize4 import (
    FakeQuantize4Function,
    fake_quantize4,
    fake_quantize4_backward,
)
from pyfastft.ops.ptq4.int4_linear_a4 import Int4LinearA4Function, int4_linear_a4
from pyfastft.ops.ptq4.int4_linear_a8 import Int4LinearA8Function, int4_linear_a8
from pyfastft.ops.ptq4.int8_linear import Int8LinearFunction, int8_linear, int8_linear_backward
from pyfastft.ops.ptq4.linear import Int4LinearFunction, int4_linear, int4_linear_backward
from pyfastft.ops.ptq4.lora_linear import (
    Int4LoRALinearFunction,
    int4_lora_linear,
    int4_lora_linear_backward,
)
from pyfastft.ops.ptq4.quantize_weight import hqq_quantize, rtn_quantize

__all__ = [
    "FakeQuantize4Function",
    "Int4LinearA4Function",
    "Int4LinearA8Function",
    "Int4LinearFunction",
    "Int4LoRALinearFunction",
    "Int8LinearFunction",
    "fake_quantize4",
    "fake_quantize4_backward",
    "hqq_quantize",
    "int4_dequantize",
    "int4_linear",
    "int4_linear_a4",
    "int4_linear_a8",
    "int4_linear_backward",
    "int4_lora_linear",
    "int4_lora_linear_backward",
    "int8_linear",
    "int8_linear_backward",
    "rtn_quantize",
]
