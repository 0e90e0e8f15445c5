"""lora_projections and lora_adapters on the CUDA library: torch's GEMM with its stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft._op import implement
from pyfastft.native import _torch_gemm_lists
from pyfastft.native.lora.linear import CudaStages, cuda_unsupported


class _Stages(CudaStages, _torch_gemm_lists.SeveralStages):
    """The stages of lora_linear, used for one projection after the other."""


def _unsupported(lead: torch.Tensor | Sequence[torch.Tensor], *_: Any) -> str | None:
    return cuda_unsupported(lead if isinstance(lead, torch.Tensor) else lead[0])


@implement("lora_projections", "cuda", unsupported=_unsupported)
def lora_projections(ys: Any, xas: Any, x: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(x):
        _torch_gemm_lists.projections_forward(CudaStages(x.device), ys, xas, x, *args)


@implement("lora_projections_backward", "cuda", unsupported=_unsupported)
def lora_projections_backward(*args: Any) -> None:
    """Six outputs, then the op's arguments."""
    grad = args[6][0]
    with torch.cuda.device_of(grad):
        _torch_gemm_lists.projections_backward(_Stages(grad.device), *args)


@implement("lora_adapters", "cuda", unsupported=_unsupported)
def lora_adapters(y: torch.Tensor, xas: Any, x: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(x):
        _torch_gemm_lists.adapters_forward(CudaStages(x.device), y, xas, x, *args)


@implement("lora_adapters_backward", "cuda", unsupported=_unsupported)
def lora_adapters_backward(*args: Any) -> None:
    """Six outputs, then the op's arguments."""
    grad = args[6]
    with torch.cuda.device_of(grad):
        _torch_gemm_lists.adapters_backward(CudaStages(grad.device), *args)
