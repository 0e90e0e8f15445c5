"""The ops' ``autograd.Function`` classes, for code that applies Functions itself."""

from pyfastft.ops.lora import LoRALinearFunction

__all__ = ["LoRALinearFunction"]
