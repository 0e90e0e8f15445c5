"""int4_linear and its backward on Triton."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft._op import implement
from pyfastft.native import _torch_int4
from pyfastft.triton_kernels._common import device_of, why_no_triton
from pyfastft.triton_kernels.ptq4._engines import TritonKernels


def unsupported(lead: torch.Tensor, scale: torch.Tensor, packed: torch.Tensor | None) -> str | None:
    """Why Triton cannot run an op of the family whose first tensor is ``lead``."""
    why = why_no_triton(lead) or _torch_int4.why_dtypes(lead.dtype, scale.dtype)
    return why or _torch_int4.why_packed(packed)


def _engine(*args: Any) -> str:
    return _torch_int4.explain_forward(TritonKernels.engines, *args)


def _gradient_engine(*args: Any) -> str:
    return _torch_int4.explain_gradient(TritonKernels.engines, *args)


@implement(
    "int4_linear",
    "triton",
    unsupported=lambda *args: unsupported(args[0], args[2], args[6]),
    engine=_engine,
)
def int4_linear(y: torch.Tensor, x: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(x):
        _torch_int4.forward(TritonKernels(device_of(x).multiprocessors), y, x, *args)


@implement(
    "int4_linear_backward",
    "triton",
    unsupported=lambda *args: unsupported(args[0], args[3], args[6]),
    engine=_gradient_engine,
)
def int4_linear_backward(*args: Any) -> None:
    """Four outputs, then the op's arguments."""
    grad = args[4]
    with torch.cuda.device_of(grad):
        _torch_int4.backward(TritonKernels(device_of(grad).multiprocessors), *args)
