"""The ops' ``autograd.Function`` classes, for code that applies Functions itself."""

from pyfastft.ops.lora import AbsRowSumsFunction, LoRALinearFunction, ScaleColumnsFunction

__all__ = ["AbsRowSumsFunction", "LoRALinearFunction", "ScaleColumnsFunction"]
