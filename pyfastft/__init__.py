"""Fused kernels for fine-tuning and compressing pretrained models, on GPU and on CPU."""

from pyfastft import autograd, functional
from pyfastft._op import Explanation, backend, explain
from pyfastft.functional import lora_linear

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "autograd",
    "backend",
    "explain",
    "functional",
    "lora_linear",
]
