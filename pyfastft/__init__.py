"""Fused kernels for fine-tuning and compressing pretrained models, on GPU and on CPU."""

from pyfastft import autograd, functional, nn, optim, pruning, sparsity
from pyfastft._op import Explanation, backend, explain
from pyfastft.config import PTQ4, LoRA, MaskedTuning
from pyfastft.conversion import Report, convert, merge, pack, revert, unmerge, unpack
from pyfastft.formats.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, verify
from pyfastft.formats.delta import load_delta, save_delta
from pyfastft.formats.peft import hotswap_adapter, load_adapter, save_adapter
from pyfastft.formats.pruned import load_pruned, save_pruned
from pyfastft.functional import lora_linear
from pyfastft.planning import ModelPlan, plan
from pyfastft.pruning.compaction import compact
from pyfastft.quantization.model import dequantize, load_quantized, quantize
from pyfastft.quantization.tensor import QTensor4
from pyfastft.sparsity.delta import Delta, Overlap, compose, overlap

__version__ = "0.1.0"

__all__ = [
    "PTQ4",
    "Checkpoint",
    "Delta",
    "Explanation",
    "LoRA",
    "MaskedTuning",
    "ModelPlan",
    "Overlap",
    "QTensor4",
    "Report",
    "autograd",
    "backend",
    "compact",
    "compose",
    "convert",
    "dequantize",
    "explain",
    "functional",
    "hotswap_adapter",
    "load_adapter",
    "load_checkpoint",
    "load_delta",
    "load_pruned",
    "load_quantized",
    "lora_linear",
    "merge",
    "nn",
    "optim",
    "overlap",
    "pack",
    "plan",
    "pruning",
    "quantize",
    "revert",
    "save_adapter",
    "save_checkpoint",
    "save_delta",
    "save_pruned",
    "sparsity",
    "unmerge",
    "unpack",
    "verify",
]
