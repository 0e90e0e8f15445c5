"""lora_linear: a linear layer with a low-rank update, gated where a gate is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, differentiable, not_differentiable
from pyfastft.ops.lora._operands import (
    expect_bias,
    expect_dropout,
    expect_input,
    expect_layer,
    expect_lead,
    expect_packed,
)

_CAST = ("x", "weight", "lora_a", "lora_b", "bias", "gate")
_NEEDS = 7


@define(
    "(Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor scaling, "
    "float p, Tensor? rng, Tensor? gate, Tensor? packed, Tensor? packed_dx) -> "
    "(Tensor y, Tensor xa)",
    autocast=_CAST,
)
def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scaling: torch.Tensor | None = None,
    p: float = 0.0,
    rng: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    packed_dx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x W^T + b + s * (xa * g) B^T with xa = dropout(x) A^T; outputs (y, xa), C-contiguous.

    x (..., K) and W (N, K) have one dtype and any strides; A (R, K) and B (N, R) have that dtype,
    or float32 beside a half-precision base; xa and the gate g, (R,) or (..., R), have theirs. s is
    one float32 (float64 beside float64). rng is read where round(65536 p) > 0 and may be absent
    elsewhere. ``packed`` and ``packed_dx`` are W and W^T as ``pack_weight`` gives them, of the same
    values; W may be absent beside them, and without them there is no base product.
    """
    op = "lora_linear"
    expect_lead(op, "x", x)
    n, k, r = expect_layer(op, "x", x, weight, lora_a, lora_b, scaling)
    if p or rng is not None:
        expect_dropout(op, x.device, p, rng)
    if x.shape[-1] != k:
        because = f"to match weight (N, K) = ({n}, {k})"
        reject(op, "x", f"shape (..., {k})", tuple(x.shape), because=because)
    if bias is not None:
        expect_bias(op, x, n, bias)
    leading = x.shape[:-1]
    if gate is not None:
        _expect_gate(op, gate, leading, r, lora_a)
    if packed is not None:
        expect_packed(op, x.device, "packed", packed)
    if packed_dx is not None:
        expect_packed(op, x.device, "packed_dx", packed_dx)
    return _alloc.empty((*leading, n), like=x), _alloc.empty((*leading, r), like=lora_a)


def _gradients(
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
) -> tuple[torch.Tensor, ...]:
    """The outputs of :func:`lora_linear_backward`; those not needed have no elements."""
    (r, k), n = lora_a.shape, lora_b.shape[0]
    return (
        _alloc.empty((*grad.shape[:-1], k) if need[0] else (0,), like=grad),
        _alloc.empty((n, k) if need[1] else (0,), like=grad),
        _alloc.empty((r, k) if need[2] else (0,), like=lora_a),
        _alloc.empty((n, r) if need[3] else (0,), like=lora_b),
        _alloc.empty((n,) if need[4] else (0,), like=grad),
        _alloc.empty(scaling.shape if need[5] else (0,), like=scaling),
        _alloc.empty(gate.shape if need[6] and gate is not None else (0,), like=lora_a),
    )


@define(
    "(Tensor grad, Tensor? x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? xa, "
    "Tensor scaling, float p, Tensor? rng, Tensor? gate, Tensor? packed, Tensor? packed_dx, "
    "bool[7] need) -> (Tensor dx, Tensor dweight, Tensor dlora_a, Tensor dlora_b, Tensor dbias, "
    "Tensor dscaling, Tensor dgate)",
    allocate=_gradients,
)
def lora_linear_backward(
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
) -> tuple[torch.Tensor, ...]:
    """The gradients of lora_linear that ``need`` names, in the order x, W, A, B, b, s, g.

    What is not needed comes back with no elements. x is read for dW and dA, xa for dB, ds and dg;
    each may be absent where those are not needed.
    """
    op = "lora_linear_backward"
    expect_lead(op, "grad", grad)
    n, k, r = expect_layer(op, "grad", grad, weight, lora_a, lora_b, scaling)
    expect_dropout(op, grad.device, p, rng)
    leading = grad.shape[:-1]
    expect_shape(op, "grad", grad, (*leading, n), "to match the rows of weight")
    if len(need) != _NEEDS:
        reject(op, "need", "seven flags (x, W, A, B, b, s, g)", len(need))
    expect_input(op, x, leading, k, grad, need[1] or need[2])
    if need[1] and weight is None:
        reject(op, "weight", "type Tensor", "None", because="to compute dW", error=TypeError)
    if xa is None and (need[3] or need[5] or need[6]):
        because = "to compute dB, ds or dg"
        reject(op, "xa", "type Tensor", "None", because=because, error=TypeError)
    if xa is not None:
        expect_dense(op, grad.device, xa=xa)
        expect_shape(op, "xa", xa, (*leading, r), "to match grad and lora_a")
        expect_dtype(op, "xa", xa, (lora_a.dtype,), "to match lora_a")
    if gate is not None:
        _expect_gate(op, gate, leading, r, lora_a)
    elif need[6]:
        reject(op, "gate", "type Tensor", "None", because="to compute dg", error=TypeError)
    for name, packing in (("packed", packed), ("packed_dx", packed_dx)):
        if packing is not None:
            expect_packed(op, grad.device, name, packing)
    return _gradients(
        grad, x, weight, lora_a, lora_b, xa, scaling, p, rng, gate, packed, packed_dx, need
    )


def _expect_gate(
    op: str, gate: torch.Tensor, leading: torch.Size, r: int, lora_a: torch.Tensor
) -> None:
    expect_dense(op, lora_a.device, gate=gate)
    if gate.shape != (r,) and gate.shape != (*leading, r):
        rows = ", ".join(map(str, (*leading, r)))
        reject(op, "gate", f"shape ({r},) or ({rows})", tuple(gate.shape), because="to gate xa")
    expect_dtype(op, "gate", gate, (lora_a.dtype,), "to match lora_a")


not_differentiable("lora_linear_backward")


@differentiable("lora_linear")
class LoRALinearFunction(torch.autograd.Function):
    """Derivative of :func:`lora_linear`; ``apply`` takes its arguments and returns (y, xa).

    Saves x only where dW or dA will be asked for, xa only where dB, ds or dg will, and the 16 bytes
    of rng; W and its packed forms, A, B, s and g are the parameters themselves.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return lora_linear.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, lora_a, lora_b, _, scaling, p, rng, gate, packed, packed_dx = inputs
        xa = output[1]
        ctx.mark_non_differentiable(xa)
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs[1] or needs[2] else None,
            weight,
            lora_a,
            lora_b,
            xa if needs[3] or needs[5] or needs[8] else None,
            scaling,
            rng,
            gate,
            packed,
            packed_dx,
        )
        ctx.p = p

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        needs = ctx.needs_input_grad
        need = [*needs[:6], needs[8]]
        x, weight, lora_a, lora_b, xa, scaling, rng, gate, packed, packed_dx = ctx.saved_tensors
        gradients = lora_linear_backward.run_backward(
            ctx,
            grad,
            x,
            weight,
            lora_a,
            lora_b,
            xa,
            scaling,
            ctx.p,
            rng,
            gate,
            packed,
            packed_dx,
            need,
        )
        wanted = [g if n else None for g, n in zip(gradients, need, strict=True)]
        return (*wanted[:6], None, None, wanted[6], None, None)
