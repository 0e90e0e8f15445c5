"""lora_projections and its backward on Triton: torch's GEMM with the stages of lora_linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft._op import implement
from pyfastft.native import _torch_gemm_lists
from pyfastft.triton_kernels._common import device_of, why_no_triton
from pyfastft.triton_kernels.lora._stages import TritonStages


def _unsupported(lead: torch.Tensor | Sequence[torch.Tensor], *_: Any) -> str | None:
    return why_no_triton(lead if isinstance(lead, torch.Tensor) else lead[0])


@implement("lora_projections", "triton", unsupported=_unsupported)
def lora_projections(ys: Any, xas: Any, x: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(x):
        stages = TritonStages(device_of(x))
        _torch_gemm_lists.projections_forward(stages, ys, xas, x, *args)


@implement("lora_projections_backward", "triton", unsupported=_unsupported)
def lora_projections_backward(*args: Any) -> None:
    """Six outputs, then the op's arguments."""
    grad = args[6][0]
    with torch.cuda.device_of(grad):
        _torch_gemm_lists.projections_backward(TritonStages(device_of(grad)), *args)
