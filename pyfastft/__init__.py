"""Fused kernels for fine-tuning and compressing pretrained models, on GPU and on CPU."""

from pyfastft import autograd, functional, nn
from pyfastft._op import Explanation, backend, explain
from pyfastft.config import LoRA
from pyfastft.conversion import Report, convert, merge, pack, revert, unmerge, unpack
from pyfastft.formats.peft import hotswap_adapter, load_adapter, save_adapter
from pyfastft.functional import lora_linear

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "LoRA",
    "Report",
    "autograd",
    "backend",
    "convert",
    "explain",
    "functional",
    "hotswap_adapter",
    "load_adapter",
    "lora_linear",
    "merge",
    "nn",
    "pack",
    "revert",
    "save_adapter",
    "unmerge",
    "unpack",
]
