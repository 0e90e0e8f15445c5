"""lora_linear and its backward on Triton: torch's GEMM with this family's stages around it."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft._op import implement
from pyfastft.native import _torch_gemm
from pyfastft.triton_kernels._common import device_of, why_no_triton
from pyfastft.triton_kernels.lora._stages import TritonStages


def _forward_unsupported(*args: Any) -> str | None:
    return why_no_triton(args[0]) or _torch_gemm.base_is_packed(args[1], *args[9:11])


def _backward_unsupported(*args: Any) -> str | None:
    return why_no_triton(args[0]) or _torch_gemm.base_is_packed(args[2], *args[10:12])


@implement(
    "lora_linear",
    "triton",
    unsupported=_forward_unsupported,
    engine=_torch_gemm.explain_forward,
)
def lora_linear(
    y: torch.Tensor,
    xa: torch.Tensor,
    x: torch.Tensor,
    *args: Any,
) -> None:
    """y = x W^T + b + s * dropout(x) A^T B^T."""
    with torch.cuda.device_of(x):
        _torch_gemm.forward(TritonStages(device_of(x)), y, xa, x, *args)


@implement(
    "lora_linear_backward",
    "triton",
    unsupported=_backward_unsupported,
    engine=_torch_gemm.explain_backward,
)
def lora_linear_backward(*args: Any) -> None:
    """The gradients of lora_linear that are needed; seven outputs, then the op's arguments."""
    grad = args[7]
    with torch.cuda.device_of(grad):
        _torch_gemm.backward(TritonStages(device_of(grad)), *args)
