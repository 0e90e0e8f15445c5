"""The ops' ``autograd.Function`` classes, for code that applies Functions itself."""

from pyfastft.ops.lora import AbsRowSumsFunction, LoRALinearFunction, ScaleColumnsFunction
from pyfastft.ops.masked import MaskedLinearFunction
from pyfastft.ops.ptq4 import Int4LinearFunction, Int4LoRALinearFunction

__all__ = [
    "AbsRowSumsFunction",
    "Int4LinearFunction",
    "Int4LoRALinearFunction",
    "LoRALinearFunction",
    "MaskedLinearFunction",
    "ScaleColumnsFunction",
]
