"""lora_linear as torch's GEMM with five low-rank stages around it: the engine on a GPU.

The dense products are torch's own, written into the op's outputs; what torch would do in a dozen
passes over the activations is left to the stages, which the CUDA and Triton backends implement.
torch's settings (TF32, reduced-precision reductions) apply to the dense products only.

Where a measurement says so (``triton_kernels/_engine.py``), a product of Triton's that has the
low-rank term in its accumulator takes the place of torch's GEMM and of the stage after it, or one
kernel that of a whole forward; for both backends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch

from pyfastft._check import name_of
from pyfastft._random import dropout_threshold
from pyfastft.triton_kernels import _engine


def base_is_packed(weight: torch.Tensor | None, *packed: torch.Tensor | None) -> str | None:
    """Why this engine cannot run without the plain weight: packed ones are the CPU library's."""
    if weight is None and any(one is not None for one in packed):
        return "the weight is there only as packed for the CPU"
    return None


class Stages(Protocol):
    """What a backend supplies. Specified in ``csrc/include/fastft/api.h`` as ``ft_cuda_lora_*``.

    No size is zero. x and grad are matrices with unit column stride and any row stride; everything
    else is C-contiguous. t is float32, scaling one float32 on the device; rng is read where the
    threshold, of 65536, is positive. Reductions have a fixed order.
    """

    def down(
        self,
        *,
        xa: torch.Tensor,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        rng: torch.Tensor | None,
        threshold: int,
    ) -> None:
        """xa = dropout(x) A^T."""

    def up(
        self, *, y: torch.Tensor, xa: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
    ) -> None:
        """y += s xa B^T."""

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
        """t = grad B, dB = s grad^T xa, ds = sum(t * xa); None is not computed."""

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
        """dA = s t^T dropout(x)."""

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
        """dx += s dropout(t A)."""


# A base product of another kind than torch's GEMM: writes its first argument, a matrix.
Base = Callable[[torch.Tensor, torch.Tensor], None]
# The same with the operands of the stage dx by their names, which it adds in the same go.
BaseDx = Callable[..., None]


def matrix_rows(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    """The tensor as a matrix with unit column stride; a copy only where strides demand one."""
    matrix = tensor.reshape(math.prod(tensor.shape[:-1]), columns)
    return matrix if matrix.stride(1) == 1 or columns == 1 else matrix.contiguous()


@functools.cache
def _fused() -> ModuleType | None:
    """Triton's products, which are imported only where one is to run."""
    try:
        from pyfastft.triton_kernels.lora import _fused as fused
    except ImportError:
        return None
    return fused


@functools.cache
def device_name(device: torch.device) -> str:
    """What the table of measurements calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose(
    direction: str,
    wide: torch.Tensor,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    threshold: int,
) -> Any:
    """The :class:`Choice` of :mod:`pyfastft.triton_kernels._engine` for one direction.

    ``wide`` is x in the forward and the gradient in the backward, as a matrix.
    """
    if weight is None or wide.shape[0] == 0 or weight.numel() == 0:
        return _engine.Choice("gemm", "there is no base product")
    device = device_name(wide.device)
    choice = _engine.settled(device)
    if choice is not None:
        return choice
    m, (n, k) = wide.shape[0], weight.shape
    rows, columns = weight.stride()
    steps = (n, k, wide.stride(0), max(rows, columns))
    problem = _engine.Problem(
        direction=direction,
        m=m,
        n=n,
        k=k,
        r=lora_a.shape[0],
        dtype=name_of(wide.dtype),
        adapter=name_of(lora_a.dtype),
        dropout=threshold > 0,
        aligned=min(rows, columns) == 1
        and all(step > 0 and step % 16 == 0 for step in steps)
        and (wide.data_ptr() | weight.data_ptr()) % 16 == 0,
    )
    choice = _engine.plan(problem, device)
    if choice.engine != "gemm" and _fused() is None:
        return _engine.Choice("gemm", f"{choice.why}, but Triton cannot be imported")
    return choice


def explain_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    *_: Any,
) -> str:
    """Which engine lora_linear would run on, and why."""
    threshold = dropout_threshold(p) if rng is not None else 0
    return _told(choose("forward", matrix_rows(x, x.shape[-1]), weight, lora_a, threshold))


def explain_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    *_: Any,
) -> str:
    """Which engine lora_linear_backward would run on, and why."""
    threshold = dropout_threshold(p) if rng is not None else 0
    return _told(choose("backward", matrix_rows(grad, grad.shape[-1]), weight, lora_a, threshold))


def _told(choice: Any) -> str:
    return f"{choice.engine}: {choice.why}"


def forward(
    stages: Stages,
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
    *,
    base: Base | None = None,
) -> None:
    """lora_linear: y = x W^T + b, then y += s (xa * g) B^T with xa = dropout(x) A^T.

    ``base(y, x)``, for a weight that is None, computes the base product, its bias included.
    """
    n, r = lora_b.shape
    k = lora_a.shape[1]
    x = matrix_rows(x, k)
    m = x.shape[0]
    y, xa = y.view(m, n), xa.view(m, r)
    threshold = dropout_threshold(p) if rng is not None else 0
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    if gate is not None:
        gate = gate.reshape(-1, r)

    choice = choose("forward", x, weight, lora_a, threshold)
    if choice.engine != "gemm":
        fused: Any = _fused()
        bias = None if bias is None else bias.contiguous()
    if choice.engine == "decode":
        fused.decode(
            y=y,
            xa=xa,
            x=x,
            weight=weight,
            lora_a=lora_a,
            lora_b=lora_b,
            bias=bias,
            gate=None if gate is None else gate.contiguous(),
            scaling=scaling,
            tiles=choice.tiles,
        )
        return
    if choice.engine == "gemm":
        if base is not None:
            base(y, x)
        elif weight is None:
            y.zero_() if bias is None else y.copy_(bias.expand_as(y))
        elif bias is None:
            torch.mm(x, weight.T, out=y)
        else:
            torch.addmm(bias, x, weight.T, out=y)
    if m == 0:
        return
    if k == 0:
        xa.zero_()
        return
    stages.down(
        xa=xa,
        x=x,
        lora_a=lora_a,
        rng=None if rng is None else rng.contiguous(),
        threshold=threshold,
    )
    if n == 0:
        return
    u = xa if gate is None else xa * gate
    if choice.engine == "gemm":
        stages.up(y=y, xa=u, lora_b=lora_b, scaling=scaling)
    else:
        fused.base_up(
            y=y,
            x=x,
            weight=weight,
            bias=bias,
            u=u,
            lora_b=lora_b,
            scaling=scaling,
            tiles=choice.tiles,
        )


def backward(
    stages: Stages,
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
    *,
    base: Base | None = None,
    base_dx: BaseDx | None = None,
) -> None:
    """lora_linear_backward; computes what ``need`` (x, W, A, B, b, s, g) asks for and no more.

    ``base(dx, grad)``, for a weight that is None, computes the base's share of dx; or, where no
    size is zero, ``base_dx(dx, grad, ...)`` all of it.
    """
    n, r = lora_b.shape
    k = lora_a.shape[1]
    need_x, need_weight, need_a, need_b, need_bias, need_scaling, need_gate = need
    grad = matrix_rows(grad, n)
    m = grad.shape[0]
    if x is not None:
        x = matrix_rows(x, k)
    threshold = dropout_threshold(p) if rng is not None else 0
    rng = None if rng is None else rng.contiguous()
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()

    choice = choose("backward", grad, weight, lora_a, threshold)
    if need_x:
        dx = dx.view(m, k)
        if base_dx is not None:
            pass  # below, where t is known
        elif base is not None:
            base(dx, grad)
        elif weight is None:
            dx.zero_()
        elif choice.engine == "gemm":
            torch.mm(grad, weight, out=dx)
    if need_weight:
        assert x is not None
        torch.mm(grad.T, x, out=dweight)
    if need_bias:
        torch.sum(grad, dim=0, out=dbias)
    if m == 0 or n == 0:
        # Sums over nothing. dx already is what it has to be: the low-rank part adds nothing.
        sums = (
            (need_a, dlora_a),
            (need_b, dlora_b),
            (need_scaling, dscaling),
            (need_gate, dgate),
        )
        for needed, output in sums:
            if needed:
                output.zero_()
        return
    if not (need_x or need_a or need_b or need_scaling or need_gate):
        return
    gated = xa = None if xa is None else xa.reshape(m, r).contiguous()
    if gate is not None:
        gate = gate.reshape(-1, r)
        gated = None if xa is None else xa * gate

    t = grad.new_empty((m, r), dtype=torch.float32)
    stages.up_grad(
        t=t,
        dlora_b=dlora_b if need_b else None,
        dscaling=dscaling if need_scaling else None,
        grad=grad,
        xa=gated,
        lora_b=lora_b,
        scaling=scaling,
    )
    if need_gate:
        assert xa is not None
        per_row = t * xa * scaling.reshape(())
        dgate.copy_(per_row.sum(0) if dgate.dim() == 1 else per_row.view_as(dgate))
    if gate is not None:
        t *= gate
    if k == 0:
        return
    if need_a:
        assert x is not None
        stages.down_grad(dlora_a=dlora_a, t=t, x=x, scaling=scaling, rng=rng, threshold=threshold)
    if not need_x:
        return
    low_rank: dict[str, Any] = {
        "t": t,
        "lora_a": lora_a,
        "scaling": scaling,
        "rng": rng,
        "threshold": threshold,
    }
    if base_dx is not None:
        base_dx(dx, grad, **low_rank)
    elif choice.engine == "gemm":
        stages.dx(dx=dx, **low_rank)
    else:
        fused: Any = _fused()
        fused.base_dx(dx=dx, grad=grad, weight=weight, tiles=choice.tiles, **low_rank)
