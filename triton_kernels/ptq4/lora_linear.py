"""int4_lora_linear and its backward on Triton: lora_linear's stages around the 4-bit base."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft._op import implement
from pyfastft.native import _torch_int4
from pyfastft.triton_kernels._common import device_of
from pyfastft.triton_kernels.lora._stages import TritonStages
from pyfastft.triton_kernels.ptq4._engines import TritonKernels
from pyfastft.triton_kernels.ptq4.linear import unsupported


def _engine(*args: Any) -> str:
    return _torch_int4.explain_forward(TritonKernels.engines, *args)


def _gradient_engine(*args: Any) -> str:
    return _torch_int4.explain_gradient(TritonKernels.engines, *args)


@implement(
    "int4_lora_linear",
    "triton",
    unsupported=lambda *args: unsupported(args[0], args[2], args[11]),
    engine=_engine,
)
def int4_lora_linear(y: torch.Tensor, xa: torch.Tensor, x: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(x):
        device = device_of(x)
        kernels = TritonKernels(device.multiprocessors)
        _torch_int4.adapted_forward(kernels, TritonStages(device), y, xa, x, *args)


@implement(
    "int4_lora_linear_backward",
    "triton",
    unsupported=lambda *args: unsupported(args[0], args[3], args[12]),
    engine=_gradient_engine,
)
def int4_lora_linear_backward(*args: Any) -> None:
    """Seven outputs, then the op's arguments."""
    grad = args[7]
    with torch.cuda.device_of(grad):
        device = device_of(grad)
        kernels = TritonKernels(device.multiprocessors)
        _torch_int4.adapted_backward(kernels, TritonStages(device), *args)
