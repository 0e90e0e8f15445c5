"""Contracts: per op its schema, its checks and allocation, and its ``autograd.Function``."""

from pyfastft.ops.lora import lora_linear, lora_linear_backward

__all__ = ["lora_linear", "lora_linear_backward"]
