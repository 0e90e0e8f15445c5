"""int4_lora_linear and its backward on Triton: lora_linear's stages around the 4-bit base."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft._op import implement
from pyfastft.native import _torch_int4
from pyfastft.triton_kernels._common import device_of
from pyfastft.triton_kernels.lora._stages import TritonStages
from pyfastft.triton_kernels.ptq4._kernels import TritonKernels
from pyfastft.triton_kernels.ptq4.linear import unsupported


def _engine(x: torch.Tensor, codes: Any, scale: Any, zero: Any, *rest: Any) -> str:
    operands = (x, codes, scale, zero, *rest[-2:])
    return _torch_int4.explain_forward(TritonKernels.engines, *operands)


@implement(
    "int4_lora_linear",
    "triton",
    unsupported=lambda *args: unsupported(args[0], args[2], args[11]),
    engine=_engine,
)
def int4_lora_linear(y: torch.Tensor, xa: torch.Tensor, x: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(x):
        device = device_of(x)
        _torch_int4.adapted_forward(TritonKernels(device), TritonStages(device), y, xa, x, *args)


@implement(
    "int4_lora_linear_backward",
    "triton",
    unsupported=lambda *args: unsupported(args[0], args[3], args[12]),
)
def int4_lora_linear_backward(*args: Any) -> None:
    """Seven outputs, then the op's arguments."""
    grad = args[7]
    with torch.cuda.device_of(grad):
        device = device_of(grad)
        _torch_int4.adapted_backward(TritonKernels(device), TritonStages(device), *args)
