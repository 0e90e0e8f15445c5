"""int4_lora_linear: a low-rank update beside a frozen 4-bit weight (QLoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, differentiable, not_differentiable
from pyfastft.ops.lora._operands import expect_bias, expect_dropout, expect_layer, expect_lead
from pyfastft.ops.ptq4._operands import expect_int4, expect_int4_packed, expect_trainable

_NEEDS = 7


@define(
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor lora_a, Tensor lora_b, "
    "Tensor? bias, Tensor scaling, float p, Tensor? rng, Tensor? perm, Tensor? packed, "
    "SymInt group_size, str codebook) -> (Tensor y, Tensor xa)",
    autocast=("x", "lora_a", "lora_b", "bias"),
)
def int4_lora_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x W^T + b + s * xa B^T with xa = dropout(x) A^T; outputs (y, xa), C-contiguous.

    W (N, K) is that of int4_dequantize, which is not built, and lies in the order of x's features,
    whatever perm says; the low-rank part is that of lora_linear: A (R, K) and B (N, R) have x's
    dtype, or float32 beside a half-precision x; s is one float32; rng and p give its mask.
    """
    op = "int4_lora_linear"
    expect_lead(op, "x", x)
    n, k, r = expect_layer(op, "x", x, None, lora_a, lora_b, scaling)
    expect_dropout(op, x.device, p, rng)
    if x.shape[-1] != k:
        reject(op, "x", f"shape (..., {k})", tuple(x.shape), because="to match lora_a")
    _expect_base(op, x, codes, scale, zero, perm, n, k, group_size, codebook)
    if bias is not None:
        expect_bias(op, x, n, bias)
    expect_int4_packed(op, codes, packed)
    leading = x.shape[:-1]
    return _alloc.empty((*leading, n), like=x), _alloc.empty((*leading, r), like=lora_a)


@define(
    "(Tensor grad, Tensor? x, Tensor codes, Tensor scale, Tensor? zero, Tensor lora_a, "
    "Tensor lora_b, Tensor? xa, Tensor scaling, float p, Tensor? rng, Tensor? perm, "
    "Tensor? packed, SymInt group_size, str codebook, bool[7] need) -> (Tensor dx, Tensor dscale, "
    "Tensor dzero, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor dscaling)"
)
def int4_lora_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
    need: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The gradients of int4_lora_linear that ``need`` names, in the order x, scale, zero, A, B, b,
    s.

    What is not needed comes back with no elements. x is read for those of scale, zero and A, xa for
    those of B and s; each may be absent where those are not needed.
    """
    op = "int4_lora_linear_backward"
    expect_lead(op, "grad", grad)
    n, k, r = expect_layer(op, "grad", grad, None, lora_a, lora_b, scaling)
    expect_dropout(op, grad.device, p, rng)
    _expect_base(op, grad, codes, scale, zero, perm, n, k, group_size, codebook)
    leading = grad.shape[:-1]
    expect_shape(op, "grad", grad, (*leading, n), "to match the rows of codes")
    if len(need) != _NEEDS:
        reject(op, "need", "seven flags (x, scale, zero, A, B, b, s)", len(need))
    expect_trainable(op, zero, need[2])
    if x is None and (need[1] or need[2] or need[3]):
        because = "to compute the gradient of scale, zero or A"
        reject(op, "x", "type Tensor", "None", because=because, error=TypeError)
    if x is not None:
        expect_dense(op, grad.device, x=x)
        expect_shape(op, "x", x, (*leading, k), "to match grad")
        expect_dtype(op, "x", x, (grad.dtype,), "to match grad")
    if xa is None and (need[4] or need[6]):
        reject(op, "xa", "type Tensor", "None", because="to compute dB or ds", error=TypeError)
    if xa is not None:
        expect_dense(op, grad.device, xa=xa)
        expect_shape(op, "xa", xa, (*leading, r), "to match grad and lora_a")
        expect_dtype(op, "xa", xa, (lora_a.dtype,), "to match lora_a")
    expect_int4_packed(op, codes, packed)
    return (
        _alloc.empty((*leading, k) if need[0] else (0,), like=grad),
        _alloc.empty(scale.shape if need[1] else (0,), like=scale),
        _alloc.empty(scale.shape if need[2] else (0,), like=scale),
        _alloc.empty((r, k) if need[3] else (0,), like=lora_a),
        _alloc.empty((n, r) if need[4] else (0,), like=lora_b),
        _alloc.empty((n,) if need[5] else (0,), like=grad),
        _alloc.empty(scaling.shape if need[6] else (0,), like=scaling),
    )


def _expect_base(
    op: str,
    lead: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    n: int,
    k: int,
    group_size: int,
    codebook: str,
) -> None:
    """The 4-bit weight, of as many rows as B."""
    rows, _ = expect_int4(op, lead, codes, scale, zero, perm, k, group_size, codebook)
    if rows != n:
        expect_shape(op, "codes", codes, (n, codes.shape[1]), "to match the rows of lora_b")


not_differentiable("int4_lora_linear_backward")


@differentiable("int4_lora_linear")
class Int4LoRALinearFunction(torch.autograd.Function):
    """Derivative of :func:`int4_lora_linear`; ``apply`` takes its arguments and returns (y, xa).

    Saves x only where the gradient of A, scale or zero will be asked for, xa only where that of B
    or s will, and the 16 bytes of rng; the rest is the layer's own.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return int4_lora_linear.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, codes, scale, zero, lora_a, lora_b, _, scaling, p, rng, perm, packed = inputs[:12]
        xa = output[1]
        ctx.mark_non_differentiable(xa)
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs[2] or needs[3] or needs[4] else None,
            *(codes, scale, zero, lora_a, lora_b),
            xa if needs[5] or needs[7] else None,
            *(scaling, rng, perm, packed),
        )
        ctx.p, ctx.group_size, ctx.codebook = p, *inputs[12:]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 14
        needs = ctx.needs_input_grad
        need = [needs[0], *needs[2:8]]
        x, codes, scale, zero, lora_a, lora_b, xa, scaling, rng, perm, packed = ctx.saved_tensors
        gradients = int4_lora_linear_backward(
            *(grad, x, codes, scale, zero, lora_a, lora_b, xa, scaling, ctx.p, rng, perm, packed),
            *(ctx.group_size, ctx.codebook, need),
        )
        dx, *others = (g if n else None for g, n in zip(gradients, need, strict=True))
        return (dx, None, *others, *(None,) * 6)
