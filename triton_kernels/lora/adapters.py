"""lora_adapters and its backward on Triton: torch's GEMM with the stages of lora_linear."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft._op import implement
from pyfastft.native import _torch_gemm_lists
from pyfastft.triton_kernels._common import device_of, why_no_triton
from pyfastft.triton_kernels.lora._stages import TritonStages


def _unsupported(lead: torch.Tensor, *_: Any) -> str | None:
    return why_no_triton(lead)


@implement("lora_adapters", "triton", unsupported=_unsupported)
def lora_adapters(y: torch.Tensor, xas: Any, x: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(x):
        stages = TritonStages(device_of(x))
        _torch_gemm_lists.adapters_forward(stages, y, xas, x, *args)


@implement("lora_adapters_backward", "triton", unsupported=_unsupported)
def lora_adapters_backward(*args: Any) -> None:
    """Six outputs, then the op's arguments."""
    grad = args[6]
    with torch.cuda.device_of(grad):
        _torch_gemm_lists.adapters_backward(TritonStages(device_of(grad)), *args)
