"""The ops' ``autograd.Function`` classes, for code that applies Functions itself."""

from pyfastft.ops.lora import AbsRowSumsFunction, LoRALinearFunction, ScaleColumnsFunction
from pyfastft.ops.masked import MaskedLinearFunction
from pyfastft.ops.prune import BlockSparseLinearFunction
from pyfastft.ops.ptq4 import (
    FakeQuantize4Function,
    Int4LinearA4Function,
    Int4LinearA8Function,
    Int4LinearFunction,
    Int4LoRALinearFunction,
    Int8LinearFunction,
)

__all__ = [
    "AbsRowSumsFunction",
    "BlockSparseLinearFunction",
    "FakeQuantize4Function",
    "Int4LinearA4Function",
    "Int4LinearA8Function",
    "Int4LinearFunction",
    "Int4LoRALinearFunction",
    "Int8LinearFunction",
    "LoRALinearFunction",
    "MaskedLinearFunction",
    "ScaleColumnsFunction",
]
