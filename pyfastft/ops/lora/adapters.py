"""lora_adapters: one layer, several adapters, each for its own rows of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import _alloc
from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define, differentiable, needs_of, not_differentiable
from pyfastft.ops.lora._operands import (
    expect_bias,
    expect_dropout,
    expect_input,
    expect_layer,
    expect_lead,
    expect_packed,
)

_Tensors = Sequence[torch.Tensor]
_CAST = ("x", "weight", "lora_a", "lora_b", "bias")
PER_ADAPTER = 3  # flags of `need` for each adapter: A, B, s


@define(
    "(Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor? bias, Tensor[] scaling, "
    "float[] p, SymInt[] lengths, Tensor? rng, Tensor? packed, Tensor? packed_dx) -> "
    "(Tensor y, Tensor[] xas)",
    autocast=_CAST,
)
def lora_adapters(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: _Tensors,
    lora_b: _Tensors,
    bias: torch.Tensor | None,
    scaling: _Tensors,
    p: Sequence[float],
    lengths: Sequence[int],
    rng: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y = x W^T + b, and on adapter j's rows + s_j * xa_j B_j^T with xa_j = dropout_j(x_j) A_j^T.

    x (M, K) has the rows of adapter 0 first, lengths[0] of them, then those of adapter 1, and so
    on; rows beyond the last adapter's get the base alone. R_j, s_j and p_j are each adapter's own.
    The mask of adapter j is that of lora_linear on its rows x_j, drawn with seed + j.
    """
    op = "lora_adapters"
    expect_lead(op, "x", x)
    if x.dim() != 2:
        expect_shape(op, "x", x, ("M", "K"))
    ranks = _expect_adapters(op, "x", x, weight, lora_a, lora_b, scaling, p, lengths, rng)
    n, k = weight.shape
    expect_shape(op, "x", x, ("M", k), "to match the columns of weight")
    if bias is not None:
        expect_bias(op, x, n, bias)
    for name, packing in (("packed", packed), ("packed_dx", packed_dx)):
        if packing is not None:
            expect_packed(op, x.device, name, packing)
    return (
        _alloc.empty((x.shape[0], n), like=x),
        [
            _alloc.empty((length, r), like=a)
            for length, r, a in zip(lengths, ranks, lora_a, strict=True)
        ],
    )


@define(
    "(Tensor grad, Tensor? x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, Tensor[] xas, "
    "Tensor[] scaling, float[] p, SymInt[] lengths, Tensor? rng, Tensor? packed, "
    "Tensor? packed_dx, bool[] need) -> (Tensor dx, Tensor dweight, Tensor[] dlora_a, "
    "Tensor[] dlora_b, Tensor dbias, Tensor[] dscaling)"
)
def lora_adapters_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_a: _Tensors,
    lora_b: _Tensors,
    xas: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    lengths: Sequence[int],
    rng: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
    need: Sequence[bool],
) -> tuple[Any, ...]:
    """The gradients of lora_adapters.

    ``need`` holds flags for x, W and b, then for each adapter those of A, B and s. What is not
    needed comes back with no elements. x may be absent where no dW or dA is needed, and xas be
    empty where no dB or ds is.
    """
    op = "lora_adapters_backward"
    expect_lead(op, "grad", grad)
    if grad.dim() != 2:
        expect_shape(op, "grad", grad, ("M", "N"))
    ranks = _expect_adapters(op, "grad", grad, weight, lora_a, lora_b, scaling, p, lengths, rng)
    n, k = weight.shape
    m, count = grad.shape[0], len(lora_a)
    expect_shape(op, "grad", grad, (m, n), "to match the rows of weight")
    if len(need) != 3 + PER_ADAPTER * count:
        what = f"{3 + PER_ADAPTER * count} flags (x, W, b, then A, B, s of each)"
        reject(op, "need", what, len(need))
    per = [need[3 + PER_ADAPTER * j :][:PER_ADAPTER] for j in range(count)]
    expect_input(op, x, grad.shape[:-1], k, grad, need[1] or any(flags[0] for flags in per))
    if xas or any(flags[1] or flags[2] for flags in per):
        if len(xas) != count:
            reject(op, "xas", f"length {count}", len(xas), because="to match lora_a")
        for j, (xa, a, length, r) in enumerate(zip(xas, lora_a, lengths, ranks, strict=True)):
            expect_dense(op, grad.device, **{f"xas[{j}]": xa})
            expect_shape(op, f"xas[{j}]", xa, (length, r), "to match lengths and lora_a")
            expect_dtype(op, f"xas[{j}]", xa, (a.dtype,), "to match lora_a")
    for name, packing in (("packed", packed), ("packed_dx", packed_dx)):
        if packing is not None:
            expect_packed(op, grad.device, name, packing)
    return (
        _alloc.empty((m, k) if need[0] else (0,), like=grad),
        _alloc.empty((n, k) if need[1] else (0,), like=grad),
        [_alloc.empty(a.shape if f[0] else (0,), like=a) for f, a in zip(per, lora_a, strict=True)],
        [_alloc.empty(b.shape if f[1] else (0,), like=b) for f, b in zip(per, lora_b, strict=True)],
        _alloc.empty((n,) if need[2] else (0,), like=grad),
        [
            _alloc.empty(s.shape if f[2] else (0,), like=s)
            for f, s in zip(per, scaling, strict=True)
        ],
    )


def _expect_adapters(
    op: str,
    lead_name: str,
    lead: torch.Tensor,
    weight: torch.Tensor,
    lora_a: _Tensors,
    lora_b: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    lengths: Sequence[int],
    rng: torch.Tensor | None,
) -> list[int]:
    """The rank of every adapter."""
    if not lora_a:
        reject(op, "lora_a", "at least one adapter", 0)
    lists = (("lora_b", lora_b), ("scaling", scaling), ("p", p), ("lengths", lengths))
    for name, values in lists:
        if len(values) != len(lora_a):
            reject(op, name, f"length {len(lora_a)}", len(values), because="to match lora_a")
    expect_dense(op, lead.device, weight=weight)
    if weight.dim() != 2:
        expect_shape(op, "weight", weight, ("N", "K"))
    expect_dtype(op, "weight", weight, (lead.dtype,), f"to match {lead_name}")
    ranks = []
    for j, (a, b, s) in enumerate(zip(lora_a, lora_b, scaling, strict=True)):
        ranks.append(expect_layer(op, lead_name, lead, weight, a, b, s, suffix=f"[{j}]")[2])
        if a.dtype is not lora_a[0].dtype:
            expect_dtype(op, f"lora_a[{j}]", a, (lora_a[0].dtype,), "to match the first")
    rows = 0
    for length in lengths:
        if length < 0:
            reject(op, "lengths", "rows of each adapter", list(lengths))
        rows = rows + length
    if rows > lead.shape[0]:
        because = f"as {lead_name} has"
        reject(op, "lengths", f"at most {lead.shape[0]} rows in all", rows, because=because)
    expect_dropout(op, lead.device, p, rng)
    return ranks


not_differentiable("lora_adapters_backward")


@differentiable("lora_adapters")
class LoRAAdaptersFunction(torch.autograd.Function):
    """Derivative of :func:`lora_adapters`. What is saved is as in lora_linear's."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, lora_a, lora_b, _, scaling, p, lengths, rng, packed, packed_dx = inputs
        xas = output[1]
        ctx.mark_non_differentiable(*xas)
        needs = needs_of(ctx, inputs)
        keep_x = needs[1] or any(needs[2])
        kept = xas if any(needs[3]) or any(needs[5]) else []
        ctx.save_for_backward(
            x if keep_x else None,
            weight,
            rng,
            packed,
            packed_dx,
            *lora_a,
            *lora_b,
            *scaling,
            *kept,
        )
        ctx.count = len(lora_a)
        ctx.p, ctx.lengths = list(p), list(lengths)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
        x, weight, rng, packed, packed_dx, *lists = ctx.saved_tensors
        count = ctx.count
        lora_a, lora_b, scaling = (lists[i * count : (i + 1) * count] for i in range(3))
        xas = lists[3 * count :]
        needs = ctx.needs_input_grad
        per_adapter = zip(needs[2], needs[3], needs[5], strict=True)
        need = [needs[0], needs[1], needs[4], *(flag for flags in per_adapter for flag in flags)]
        dx, dweight, dlora_a, dlora_b, dbias, dscaling = lora_adapters_backward(
            grad,
            x,
            weight,
            lora_a,
            lora_b,
            xas,
            scaling,
            ctx.p,
            ctx.lengths,
            rng,
            packed,
            packed_dx,
            need,
        )

        def wanted(gradients: list[torch.Tensor], flags: list[bool]) -> list[torch.Tensor | None]:
            return [g if flag else None for g, flag in zip(gradients, flags, strict=True)]

        return (
            dx if needs[0] else None,
            dweight if needs[1] else None,
            wanted(dlora_a, needs[2]),
            wanted(dlora_b, needs[3]),
            dbias if needs[4] else None,
            wanted(dscaling, needs[5]),
            *(None,) * 5,
        )
