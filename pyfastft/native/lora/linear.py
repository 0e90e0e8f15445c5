"""lora_linear on the native libraries."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _native
from pyfastft._check import name_of
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft._random import dropout_threshold
from pyfastft.native import _cpu_engine, _torch_gemm
from pyfastft.native.lora._layers import cpu_unsupported, refuse_packed


@implement("lora_linear", "cpu", unsupported=cpu_unsupported, engine=_cpu_engine.explain_forward)
def lora_linear(
    y: torch.Tensor,
    xa: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    gate: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
) -> None:
    n, r = lora_b.shape
    k = lora_a.shape[1]
    m = xa.numel() // r
    if x.dim() != 2:
        x = x.reshape(m, k)
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    if rng is not None:
        rng = rng.contiguous()
    gate_stride_m = 0
    if gate is not None:
        gate_stride_m = r if gate.dim() > 1 else 0
        gate = gate.contiguous()
    if packed is not None:
        packed = packed.contiguous()
    if packed_dx is not None:
        packed_dx = packed_dx.contiguous()
    gemm = _cpu_engine.choose("forward", x, weight, packed, packed_dx).engine == "gemm"
    if gemm:
        assert weight is not None
        torch.mm(x, weight.T, out=y.view(m, n))
        weight = None
    x_stride_m, x_stride_k = x.stride()
    weight_stride_n, weight_stride_k = (0, 0) if weight is None else weight.stride()
    try:
        _native.cpu().lora_linear(
            y=y.data_ptr(),
            xa=xa.data_ptr(),
            x=x.data_ptr(),
            weight=address(weight),
            lora_a=lora_a.data_ptr(),
            lora_b=lora_b.data_ptr(),
            bias=address(bias),
            scaling=scaling.data_ptr(),
            rng=address(rng),
            gate=address(gate),
            packed=address(packed),
            packed_dx=address(packed_dx),
            m=m,
            n=n,
            k=k,
            r=r,
            x_stride_m=x_stride_m,
            x_stride_k=x_stride_k,
            weight_stride_n=weight_stride_n,
            weight_stride_k=weight_stride_k,
            gate_stride_m=gate_stride_m,
            packed_bytes=0 if packed is None else packed.numel(),
            packed_dx_bytes=0 if packed_dx is None else packed_dx.numel(),
            threshold=dropout_threshold(p) if p else 0,
            dtype=DTYPES[x.dtype],
            adapter_dtype=DTYPES[lora_a.dtype],
            accumulate=gemm,
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_packed("lora_linear", error, (packed, packed_dx))


@implement(
    "lora_linear_backward",
    "cpu",
    unsupported=cpu_unsupported,
    engine=_cpu_engine.explain_backward,
)
def lora_linear_backward(
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dlora_a: torch.Tensor,
    dlora_b: torch.Tensor,
    dbias: torch.Tensor,
    dscaling: torch.Tensor,
    dgate: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    gate: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
    need: Sequence[bool],
) -> None:
    n, r = lora_b.shape
    k = lora_a.shape[1]
    m = grad.shape[:-1].numel()
    if grad.dim() != 2:
        grad = grad.reshape(m, n)
    if x is not None and x.dim() != 2:
        x = x.reshape(m, k)
    if xa is not None:
        xa = xa.contiguous()
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    if rng is not None:
        rng = rng.contiguous()
    gate_stride_m = 0
    if gate is not None:
        gate_stride_m = r if gate.dim() > 1 else 0
        gate = gate.contiguous()
    if packed is not None:
        packed = packed.contiguous()
    if packed_dx is not None:
        packed_dx = packed_dx.contiguous()
    gemm = _cpu_engine.choose("backward", grad, weight, packed, packed_dx).engine == "gemm"
    if gemm:
        assert weight is not None
        if need[0]:
            torch.mm(grad, weight, out=dx.view(m, k))
        if need[1]:
            assert x is not None
            torch.mm(grad.T, x, out=dweight)
        weight = None
    grad_stride_m, grad_stride_n = grad.stride()
    x_stride_m, x_stride_k = (0, 0) if x is None else x.stride()
    weight_stride_n, weight_stride_k = (0, 0) if weight is None else weight.stride()
    # An output that is not needed has no elements: its address is null, and it is not computed.
    try:
        _native.cpu().lora_linear_backward(
            dx=dx.data_ptr(),
            dweight=0 if gemm else dweight.data_ptr(),
            dlora_a=dlora_a.data_ptr(),
            dlora_b=dlora_b.data_ptr(),
            dbias=dbias.data_ptr(),
            dscaling=dscaling.data_ptr(),
            dgate=dgate.data_ptr(),
            grad=grad.data_ptr(),
            x=address(x),
            weight=address(weight),
            lora_a=lora_a.data_ptr(),
            lora_b=lora_b.data_ptr(),
            xa=address(xa),
            scaling=scaling.data_ptr(),
            rng=address(rng),
            gate=address(gate),
            packed=address(packed),
            packed_dx=address(packed_dx),
            m=m,
            n=n,
            k=k,
            r=r,
            grad_stride_m=grad_stride_m,
            grad_stride_n=grad_stride_n,
            x_stride_m=x_stride_m,
            x_stride_k=x_stride_k,
            weight_stride_n=weight_stride_n,
            weight_stride_k=weight_stride_k,
            gate_stride_m=gate_stride_m,
            packed_bytes=0 if packed is None else packed.numel(),
            packed_dx_bytes=0 if packed_dx is None else packed_dx.numel(),
            threshold=dropout_threshold(p) if p else 0,
            dtype=DTYPES[grad.dtype],
            adapter_dtype=DTYPES[lora_a.dtype],
            accumulate=gemm,
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_packed("lora_linear_backward", error, (packed, packed_dx))


# -- CUDA ------------------------------------------------------------------------------------------


@functools.cache
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def cuda_unsupported(first: torch.Tensor, *_: Any) -> str | None:
    """Why the CUDA library cannot run an op whose first argument has the base's dtype."""
    if first.dtype not in DTYPES:
        return f"{name_of(first.dtype)} is not one of {', '.join(map(name_of, DTYPES))}"
    why = _native.why_no_cuda()
    if why is not None:
        return why
    if first.device.type != "cuda":
        return f"the tensors are on {first.device}"
    capability = _compute_capability(first.device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def _cuda_forward_unsupported(*args: Any) -> str | None:
    return cuda_unsupported(args[0]) or _torch_gemm.base_is_packed(args[1], *args[9:11])


def _cuda_backward_unsupported(*args: Any) -> str | None:
    return cuda_unsupported(args[0]) or _torch_gemm.base_is_packed(args[2], *args[10:12])


class CudaStages:
    """The stages of :mod:`pyfastft.native._torch_gemm` on the current stream of a device.

    A workspace may go back to torch's allocator as soon as its kernel is launched: whoever gets
    the memory next runs on the same stream, after it.
    """

    def __init__(self, device: torch.device) -> None:
        self.library = _native.cuda()
        self.stream = _native.stream(device)

    def down(
        self,
        *,
        xa: torch.Tensor,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        rng: torch.Tensor | None,
        threshold: int,
    ) -> None:
        m, k = x.shape
        self.library.lora_down(
            xa=xa.data_ptr(),
            x=x.data_ptr(),
            lora_a=lora_a.data_ptr(),
            rng=address(rng),
            m=m,
            k=k,
            r=lora_a.shape[0],
            x_stride_m=x.stride(0),
            threshold=threshold,
            dtype=DTYPES[x.dtype],
            adapter_dtype=DTYPES[lora_a.dtype],
            stream=self.stream,
        )

    def up(
        self, *, y: torch.Tensor, xa: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
    ) -> None:
        m, n = y.shape
        self.library.lora_up(
            y=y.data_ptr(),
            xa=xa.data_ptr(),
            lora_b=lora_b.data_ptr(),
            scaling=scaling.data_ptr(),
            m=m,
            n=n,
            r=lora_b.shape[1],
            dtype=DTYPES[y.dtype],
            adapter_dtype=DTYPES[lora_b.dtype],
            stream=self.stream,
        )

    def up_grad(
        self,
        *,
        t: torch.Tensor,
        dlora_b: torch.Tensor | None,
        dscaling: torch.Tensor | None,
        grad: torch.Tensor,
        xa: torch.Tensor | None,
        lora_b: torch.Tensor,
        scaling: torch.Tensor,
    ) -> None:
        m, n = grad.shape
        r = lora_b.shape[1]
        workspace = t.new_empty(self.library.lora_up_grad_workspace(m, n, r))
        self.library.lora_up_grad(
            t=t.data_ptr(),
            dlora_b=address(dlora_b),
            dscaling=address(dscaling),
            workspace=workspace.data_ptr(),
            grad=grad.data_ptr(),
            xa=address(xa),
            lora_b=lora_b.data_ptr(),
            scaling=scaling.data_ptr(),
            workspace_floats=workspace.numel(),
            m=m,
            n=n,
            r=r,
            grad_stride_m=grad.stride(0),
            dtype=DTYPES[grad.dtype],
            adapter_dtype=DTYPES[lora_b.dtype],
            stream=self.stream,
        )

    def down_grad(
        self,
        *,
        dlora_a: torch.Tensor,
        t: torch.Tensor,
        x: torch.Tensor,
        scaling: torch.Tensor,
        rng: torch.Tensor | None,
        threshold: int,
    ) -> None:
        m, k = x.shape
        r = t.shape[1]
        workspace = t.new_empty(self.library.lora_down_grad_workspace(m, k, r))
        self.library.lora_down_grad(
            dlora_a=dlora_a.data_ptr(),
            workspace=workspace.data_ptr(),
            t=t.data_ptr(),
            x=x.data_ptr(),
            scaling=scaling.data_ptr(),
            rng=address(rng),
            workspace_floats=workspace.numel(),
            m=m,
            k=k,
            r=r,
            x_stride_m=x.stride(0),
            threshold=threshold,
            dtype=DTYPES[x.dtype],
            adapter_dtype=DTYPES[dlora_a.dtype],
            stream=self.stream,
        )

    def dx(
        self,
        *,
        dx: torch.Tensor,
        t: torch.Tensor,
        lora_a: torch.Tensor,
        scaling: torch.Tensor,
        rng: torch.Tensor | None,
        threshold: int,
    ) -> None:
        m, k = dx.shape
        self.library.lora_dx(
            dx=dx.data_ptr(),
            t=t.data_ptr(),
            lora_a=lora_a.data_ptr(),
            scaling=scaling.data_ptr(),
            rng=address(rng),
            m=m,
            k=k,
            r=t.shape[1],
            threshold=threshold,
            dtype=DTYPES[dx.dtype],
            adapter_dtype=DTYPES[lora_a.dtype],
            stream=self.stream,
        )


@implement(
    "lora_linear",
    "cuda",
    unsupported=_cuda_forward_unsupported,
    engine=_torch_gemm.explain_forward,
)
def lora_linear_cuda(y: torch.Tensor, xa: torch.Tensor, x: torch.Tensor, *args: Any) -> None:
    """y = x W^T + b + s * dropout(x) A^T B^T."""
    with torch.cuda.device_of(x):
        _torch_gemm.forward(CudaStages(x.device), y, xa, x, *args)


@implement(
    "lora_linear_backward",
    "cuda",
    unsupported=_cuda_backward_unsupported,
    engine=_torch_gemm.explain_backward,
)
def lora_linear_backward_cuda(*args: Any) -> None:
    """The gradients of lora_linear that are needed; seven outputs, then the op's arguments."""
    grad = args[7]
    with torch.cuda.device_of(grad):
        _torch_gemm.backward(CudaStages(grad.device), *args)
