"""The lora family's contracts. The derivation is in ``lora.md`` beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import (
    FLOATS,
    expect_dense,
    expect_dtype,
    expect_shape,
    reject,
)
from pyfastft._op import define, differentiable, not_differentiable
from pyfastft._random import dropout_threshold

_CAST = ("x", "weight", "lora_a", "lora_b", "bias")


@define(
    "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor scaling, "
    "float p, Tensor? rng) -> (Tensor y, Tensor xa)",
    autocast=_CAST,
)
def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scaling: torch.Tensor | None = None,
    p: float = 0.0,
    rng: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x W^T + b + s * xa B^T with xa = dropout(x) A^T; outputs (y, xa), C-contiguous.

    x (..., K) and W (N, K) have one dtype and any strides; A (R, K) and B (N, R) have that dtype,
    or float32 beside a half-precision base; xa has theirs. s is one float32 (float64 beside
    float64). rng is read where round(65536 p) > 0 and may be absent elsewhere.
    """
    op = "lora_linear"
    n, k, r = _expect_operands(op, "x", x, weight, lora_a, lora_b, scaling, p, rng)
    if x.shape[-1] != k:
        because = f"to match weight (N, K) = ({n}, {k})"
        reject(op, "x", f"shape (..., {k})", tuple(x.shape), because=because)
    if bias is not None:
        expect_dense(op, x.device, bias=bias)
        expect_shape(op, "bias", bias, (n,), "to match the rows of weight")
        expect_dtype(op, "bias", bias, (x.dtype,), "to match x")
    leading = x.shape[:-1]
    return _alloc.empty((*leading, n), like=x), _alloc.empty((*leading, r), like=lora_a)


@define(
    "(Tensor grad, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? xa, "
    "Tensor scaling, float p, Tensor? rng, bool[6] need) -> "
    "(Tensor dx, Tensor dweight, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor dscaling)"
)
def lora_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    need: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The gradients of lora_linear that ``need`` names, in the order x, W, A, B, b, s.

    What is not needed comes back with no elements. x is read for dW and dA, xa for dB and ds; each
    may be absent where those are not needed.
    """
    op = "lora_linear_backward"
    n, k, r = _expect_operands(op, "grad", grad, weight, lora_a, lora_b, scaling, p, rng)
    leading = grad.shape[:-1]
    expect_shape(op, "grad", grad, (*leading, n), "to match the rows of weight")
    expect_dtype(op, "grad", grad, (weight.dtype,), "to match weight")
    if len(need) != 6:
        reject(op, "need", "six flags (x, W, A, B, b, s)", len(need))
    if x is None and (need[1] or need[2]):
        reject(op, "x", "type Tensor", "None", because="to compute dW or dA", error=TypeError)
    if x is not None:
        expect_dense(op, grad.device, x=x)
        expect_shape(op, "x", x, (*leading, k), "to match grad")
        expect_dtype(op, "x", x, (grad.dtype,), "to match grad")
    if xa is None and (need[3] or need[5]):
        reject(op, "xa", "type Tensor", "None", because="to compute dB or ds", error=TypeError)
    if xa is not None:
        expect_dense(op, grad.device, xa=xa)
        expect_shape(op, "xa", xa, (*leading, r), "to match grad and lora_a")
        expect_dtype(op, "xa", xa, (lora_a.dtype,), "to match lora_a")
    return (
        _alloc.empty((*leading, k) if need[0] else (0,), like=grad),
        _alloc.empty((n, k) if need[1] else (0,), like=weight),
        _alloc.empty((r, k) if need[2] else (0,), like=lora_a),
        _alloc.empty((n, r) if need[3] else (0,), like=lora_b),
        _alloc.empty((n,) if need[4] else (0,), like=grad),
        _alloc.empty(scaling.shape if need[5] else (0,), like=scaling),
    )


def _expect_operands(
    op: str,
    lead_name: str,
    lead: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | None,
    p: float,
    rng: torch.Tensor | None,
) -> tuple[int, int, int]:
    """Check what both directions share; x leads the forward, the gradient the backward."""
    expect_dense(op, None, **{lead_name: lead})
    dtype, device = lead.dtype, lead.device
    expect_dense(op, device, weight=weight, lora_a=lora_a, lora_b=lora_b, scaling=scaling)
    assert scaling is not None
    if dtype not in FLOATS:
        expect_dtype(op, lead_name, lead, FLOATS)
    if lead.dim() == 0:
        reject(op, lead_name, "at least one dimension", "a scalar")

    if weight.dim() != 2:
        expect_shape(op, "weight", weight, ("N", "K"))
    n, k = weight.shape
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        expect_shape(op, "lora_a", lora_a, ("R", k), "to match the columns of weight")
    r = lora_a.shape[0]
    if r < 1:
        reject(op, "lora_a", "rank at least 1", r)
    if lora_b.shape != (n, r):
        expect_shape(op, "lora_b", lora_b, (n, r), "to match weight and lora_a")
    if scaling.numel() != 1:
        reject(op, "scaling", "one element", tuple(scaling.shape))

    beside = "beside the first argument"
    if weight.dtype is not dtype:
        expect_dtype(op, "weight", weight, (dtype,), f"to match {lead_name}")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    if lora_a.dtype is not dtype and lora_a.dtype is not wide:
        expect_dtype(op, "lora_a", lora_a, (dtype, wide), beside)
    if lora_b.dtype is not lora_a.dtype:
        expect_dtype(op, "lora_b", lora_b, (lora_a.dtype,), "to match lora_a")
    if scaling.dtype is not wide:
        expect_dtype(op, "scaling", scaling, (wide,), beside)

    if not 0.0 <= p <= 1.0:
        reject(op, "p", "a probability", p)
    if rng is not None:
        expect_dense(op, device, rng=rng)
        expect_shape(op, "rng", rng, (2,), "(seed, offset)")
        expect_dtype(op, "rng", rng, (torch.int64,))
    elif p and dropout_threshold(p):
        reject(op, "rng", "type Tensor", "None", because=f"to drop with p = {p}", error=TypeError)
    return n, k, r


not_differentiable("lora_linear_backward")


@differentiable("lora_linear")
class LoRALinearFunction(torch.autograd.Function):
    """Derivative of :func:`lora_linear`; ``apply`` takes its arguments and returns (y, xa).

    Saves x only where dW or dA will be asked for, xa only where dB or ds will, and the 16 bytes of
    rng; W, A, B and s are the parameters themselves.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return lora_linear.overload(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, lora_a, lora_b, _, scaling, p, rng = inputs
        xa = output[1]
        ctx.mark_non_differentiable(xa)
        ctx.set_materialize_grads(False)
        _, weight_needs, a_needs, b_needs, _, scaling_needs = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x if weight_needs or a_needs else None,
            weight,
            lora_a,
            lora_b,
            xa if b_needs or scaling_needs else None,
            scaling,
            rng,
        )
        ctx.p = p

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        need = list(ctx.needs_input_grad[:6])
        x, weight, lora_a, lora_b, xa, scaling, rng = ctx.saved_tensors
        gradients = lora_linear_backward(
            grad, x, weight, lora_a, lora_b, xa, scaling, ctx.p, rng, need
        )
        wanted = [g if n else None for g, n in zip(gradients, need, strict=True)]
        return (*wanted, None, None)
