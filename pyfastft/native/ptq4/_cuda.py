"""The ptq4 family on the CUDA library: panels for torch's GEMM, and its own products."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native import _torch_int4
from pyfastft.native._torch_int4 import Weight
from pyfastft.native.lora.linear import CudaStages, cuda_unsupported
from pyfastft.native.ptq4._weights import zero_kind


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _triton() -> Any:
    """Triton's products, which are imported only where one may run; None without Triton."""
    try:
        from pyfastft.triton_kernels.ptq4._engines import TritonKernels
    except ImportError:
        return None
    return TritonKernels


@functools.cache
def engines() -> tuple[str, ...]:
    """What the CUDA backend can compute a product with."""
    return ("panels", "gemv", "mma") + (() if _triton() is None else ("product",))


class CudaKernels:
    """The :class:`pyfastft.native._torch_int4.Int4Kernels` on the current stream of a device.

    Partial sums may go back to torch's allocator as soon as their kernel is launched: whoever gets
    the memory next runs on the same stream, after it.
    """

    def __init__(self, device: torch.device) -> None:
        self.library = _native.cuda()
        self.stream = _native.stream(device)
        self.engines = engines()
        self.multiprocessors = _multiprocessors(device)

    def dequantize(
        self,
        out: torch.Tensor,
        weight: Weight,
        *,
        first: int = 0,
        perm: torch.Tensor | None = None,
    ) -> None:
        """Columns of W; see the protocol."""
        self.library.int4_dequantize(
            weight=out.data_ptr(),
            perm=address(perm),
            first_column=first,
            columns=out.shape[1],
            dtype=DTYPES[out.dtype],
            **self._weight(weight),
        )

    def linear(
        self,
        choice: Any,
        *,
        y: torch.Tensor,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        splits: int,
    ) -> None:
        """y = x W^T + b by gemv, mma or Triton's product."""
        if choice.engine == "product":
            operands = {"y": y, "x": x, "weight": weight, "bias": bias}
            _triton()(self.multiprocessors).linear(choice, **operands, splits=splits)
            return
        partials = y.new_empty(splits * y.numel() if splits > 1 else 0, dtype=torch.float32)
        kernel = self.library.int4_gemv if choice.engine == "gemv" else self.library.int4_mma
        kernel(
            y=y.data_ptr(),
            partials=partials.data_ptr(),
            x=x.data_ptr(),
            bias=address(bias),
            partials_floats=partials.numel(),
            m=x.shape[0],
            x_stride_m=x.stride(0),
            splits=splits,
            dtype=DTYPES[x.dtype],
            **self._weight(weight),
        )

    def input_gradient(self, choice: Any, **operands: Any) -> None:
        """dX by Triton's product, the only engine beside panels."""
        _triton()(self.multiprocessors).input_gradient(choice, **operands)

    def _weight(self, weight: Weight) -> dict[str, int]:
        return {
            "codes": weight.codes.data_ptr(),
            "scale": weight.scale.data_ptr(),
            "zero": address(weight.zero),
            "table": address(weight.table),
            "n": weight.n,
            "k": weight.k,
            "group_size": weight.group_size,
            "scale_dtype": DTYPES[weight.scale.dtype],
            "zero_kind": zero_kind(weight.zero),
            "stream": self.stream,
        }


# -- the ops ---------------------------------------------------------------------------------------


def _unsupported(
    lead: torch.Tensor, scale: torch.Tensor, packed: torch.Tensor | None
) -> str | None:
    why = cuda_unsupported(lead) or _torch_int4.why_dtypes(scale.dtype)
    return why or _torch_int4.why_packed(packed)


def _dequantize_unsupported(
    codes: torch.Tensor, scale: torch.Tensor, zero: Any, perm: Any, *rest: Any
) -> str | None:
    # In the dtype of the result: of codes there is but one.
    lead = torch.empty(0, dtype=rest[-1], device=codes.device)
    return _unsupported(lead, scale, None)


def _engine(*args: Any) -> str:
    return _torch_int4.explain_forward(engines(), *args)


def _gradient_engine(*args: Any) -> str:
    return _torch_int4.explain_gradient(engines(), *args)


@implement("int4_dequantize", "cuda", unsupported=_dequantize_unsupported)
def int4_dequantize(weight: torch.Tensor, codes: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(codes):
        _torch_int4.dequantize(CudaKernels(codes.device).dequantize, weight, codes, *args)


@implement(
    "int4_linear",
    "cuda",
    unsupported=lambda *args: _unsupported(args[0], args[2], args[6]),
    engine=_engine,
)
def int4_linear(y: torch.Tensor, x: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(x):
        _torch_int4.forward(CudaKernels(x.device), y, x, *args)


@implement(
    "int4_linear_backward",
    "cuda",
    unsupported=lambda *args: _unsupported(args[0], args[3], args[6]),
    engine=_gradient_engine,
)
def int4_linear_backward(*args: Any) -> None:
    """Four outputs, then the op's arguments."""
    grad = args[4]
    with torch.cuda.device_of(grad):
        _torch_int4.backward(CudaKernels(grad.device), *args)


@implement(
    "int4_lora_linear",
    "cuda",
    unsupported=lambda *args: _unsupported(args[0], args[2], args[11]),
    engine=_engine,
)
def int4_lora_linear(y: torch.Tensor, xa: torch.Tensor, x: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(x):
        kernels, stages = CudaKernels(x.device), CudaStages(x.device)
        _torch_int4.adapted_forward(kernels, stages, y, xa, x, *args)


@implement(
    "int4_lora_linear_backward",
    "cuda",
    unsupported=lambda *args: _unsupported(args[0], args[3], args[12]),
    engine=_gradient_engine,
)
def int4_lora_linear_backward(*args: Any) -> None:
    """Seven outputs, then the op's arguments."""
    grad = args[7]
    with torch.cuda.device_of(grad):
        kernels, stages = CudaKernels(grad.device), CudaStages(grad.device)
        _torch_int4.adapted_backward(kernels, stages, *args)
