"""lora_projections: several adapted layers of one input as one op, such as q, k and v."""

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
_CAST = ("x", "weights", "lora_a", "lora_b", "biases")
PER_PROJECTION = 5  # flags of `need` for each projection: W, A, B, b, s


@define(
    "(Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] biases, "
    "Tensor[] scaling, float[] p, Tensor? rng, Tensor[] packed, Tensor[] packed_dx) -> "
    "(Tensor[] ys, Tensor[] xas)",
    autocast=_CAST,
)
def lora_projections(
    x: torch.Tensor,
    weights: _Tensors,
    lora_a: _Tensors,
    lora_b: _Tensors,
    biases: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    rng: torch.Tensor | None,
    packed: _Tensors,
    packed_dx: _Tensors,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """y_j = x W_j^T + b_j + s_j * xa_j B_j^T with xa_j = dropout_j(x) A_j^T, j = 0 .. P - 1.

    Operands as of lora_linear, one per projection; N_j and R_j may differ. Projection j drops with
    p_j and draws with seed + j. A bias of no elements is none; ``packed`` and ``packed_dx`` hold
    P packed weights or nothing.
    """
    op = "lora_projections"
    expect_lead(op, "x", x)
    sizes = _expect_layers(op, "x", x, weights, lora_a, lora_b, scaling, p, rng)
    k = weights[0].shape[1]
    if x.shape[-1] != k:
        because = "to match the columns of the weights"
        reject(op, "x", f"shape (..., {k})", tuple(x.shape), because=because)
    _expect_count(op, "biases", biases, len(weights))
    for j, (bias, (n, _)) in enumerate(zip(biases, sizes, strict=True)):
        if bias.numel():
            expect_bias(op, x, n, bias, f"biases[{j}]")
    _expect_packings(op, x, len(weights), packed=packed, packed_dx=packed_dx)
    leading = x.shape[:-1]
    return (
        [_alloc.empty((*leading, n), like=x) for n, _ in sizes],
        [_alloc.empty((*leading, r), like=a) for a, (_, r) in zip(lora_a, sizes, strict=True)],
    )


@define(
    "(Tensor[] grads, Tensor? x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, "
    "Tensor[] xas, Tensor[] scaling, float[] p, Tensor? rng, Tensor[] packed, "
    "Tensor[] packed_dx, bool[] need) -> (Tensor dx, Tensor[] dweights, Tensor[] dlora_a, "
    "Tensor[] dlora_b, Tensor[] dbiases, Tensor[] dscaling)"
)
def lora_projections_backward(
    grads: _Tensors,
    x: torch.Tensor | None,
    weights: _Tensors,
    lora_a: _Tensors,
    lora_b: _Tensors,
    xas: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    rng: torch.Tensor | None,
    packed: _Tensors,
    packed_dx: _Tensors,
    need: Sequence[bool],
) -> tuple[Any, ...]:
    """The gradients of lora_projections: dX is the sum over projections, written once.

    ``need`` holds a flag for x, then for each projection those of W, A, B, b and s. What is not
    needed comes back with no elements. x may be absent where no dW or dA is needed, and xas be
    empty where no dB or ds is.
    """
    op = "lora_projections_backward"
    if not grads:
        reject(op, "grads", "one gradient per projection", 0)
    expect_lead(op, "grads[0]", grads[0])
    like, count = grads[0], len(weights)
    sizes = _expect_layers(op, "grads[0]", like, weights, lora_a, lora_b, scaling, p, rng)
    leading, k = like.shape[:-1], weights[0].shape[1]
    _expect_count(op, "grads", grads, count)
    for j, (grad, (n, _)) in enumerate(zip(grads, sizes, strict=True)):
        name = f"grads[{j}]"
        expect_dense(op, like.device, **{name: grad})
        expect_shape(op, name, grad, (*leading, n), "to match the rows of its weight")
        expect_dtype(op, name, grad, (like.dtype,), "to match the first")
    if len(need) != 1 + PER_PROJECTION * count:
        what = f"{1 + PER_PROJECTION * count} flags (x, then W, A, B, b, s of each)"
        reject(op, "need", what, len(need))
    per = [need[1 + PER_PROJECTION * j :][:PER_PROJECTION] for j in range(count)]
    expect_input(op, x, leading, k, like, any(flags[0] or flags[1] for flags in per))
    if xas or any(flags[2] or flags[4] for flags in per):
        _expect_count(op, "xas", xas, count)
        for j, (xa, a, (_, r)) in enumerate(zip(xas, lora_a, sizes, strict=True)):
            expect_dense(op, like.device, **{f"xas[{j}]": xa})
            expect_shape(op, f"xas[{j}]", xa, (*leading, r), "to match grads and lora_a")
            expect_dtype(op, f"xas[{j}]", xa, (a.dtype,), "to match lora_a")
    _expect_packings(op, like, count, packed=packed, packed_dx=packed_dx)

    def empty(flag: int, shapes: list[tuple[int, ...]], likes: _Tensors) -> list[torch.Tensor]:
        return [
            _alloc.empty(shape if flags[flag] else (0,), like=one)
            for flags, shape, one in zip(per, shapes, likes, strict=True)
        ]

    return (
        _alloc.empty((*leading, k) if need[0] else (0,), like=like),
        empty(0, [(n, k) for n, _ in sizes], weights),
        empty(1, [(r, k) for _, r in sizes], lora_a),
        empty(2, [(n, r) for n, r in sizes], lora_b),
        empty(3, [(n,) for n, _ in sizes], grads),
        empty(4, [tuple(s.shape) for s in scaling], scaling),
    )


def _expect_count(op: str, name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        reject(op, name, f"length {count}", len(values), because="to match weights")


def _expect_layers(
    op: str,
    lead_name: str,
    lead: torch.Tensor,
    weights: _Tensors,
    lora_a: _Tensors,
    lora_b: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    rng: torch.Tensor | None,
) -> list[tuple[int, int]]:
    """(N, R) of every projection."""
    if not weights:
        reject(op, "weights", "at least one weight", 0)
    for name, values in (("lora_a", lora_a), ("lora_b", lora_b), ("scaling", scaling), ("p", p)):
        _expect_count(op, name, values, len(weights))
    sizes = []
    for j, operands in enumerate(zip(weights, lora_a, lora_b, scaling, strict=True)):
        n, k, r = expect_layer(op, lead_name, lead, *operands, suffix=f"[{j}]")
        if k != weights[0].shape[1]:
            columns = ("N", weights[0].shape[1])
            expect_shape(op, f"weights[{j}]", operands[0], columns, "to match the first")
        if operands[1].dtype is not lora_a[0].dtype:
            expect_dtype(op, f"lora_a[{j}]", operands[1], (lora_a[0].dtype,), "to match the first")
        sizes.append((n, r))
    expect_dropout(op, lead.device, p, rng)
    return sizes


def _expect_packings(op: str, like: torch.Tensor, count: int, **packings: _Tensors) -> None:
    for name, values in packings.items():
        if values:
            _expect_count(op, name, values, count)
            for j, value in enumerate(values):
                expect_packed(op, like.device, f"{name}[{j}]", value)


not_differentiable("lora_projections_backward")


@differentiable("lora_projections")
class LoRAProjectionsFunction(torch.autograd.Function):
    """Derivative of :func:`lora_projections`. What is saved is as in lora_linear's."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weights, lora_a, lora_b, biases, scaling, p, rng, packed, packed_dx = inputs
        xas = output[1]
        ctx.mark_non_differentiable(*xas)
        needs = needs_of(ctx, inputs)
        keep_x = any(needs[1]) or any(needs[2])
        keep_xas = any(needs[3]) or any(needs[5])
        ctx.kept = tuple(
            map(len, (weights, lora_a, lora_b, xas if keep_xas else (), scaling, packed, packed_dx))
        )
        ctx.save_for_backward(
            x if keep_x else None,
            rng,
            *weights,
            *lora_a,
            *lora_b,
            *(xas if keep_xas else ()),
            *scaling,
            *packed,
            *packed_dx,
        )
        ctx.p = list(p)
        ctx.has_bias = [bias.numel() > 0 for bias in biases]

    @staticmethod
    def backward(ctx: Any, grads: list[torch.Tensor], _: Any) -> tuple[Any, ...]:
        x, rng, *tensors = ctx.saved_tensors
        lists, begin = [], 0
        for length in ctx.kept:
            lists.append(tensors[begin : begin + length])
            begin += length
        weights, lora_a, lora_b, xas, scaling, packed, packed_dx = lists
        needs = list(ctx.needs_input_grad)
        # A bias of no elements has a gradient of none: what is not computed.
        asked_biases = needs[4]
        needs[4] = [n and has for n, has in zip(asked_biases, ctx.has_bias, strict=True)]
        per_projection = zip(*needs[1:6], strict=True)
        need = [needs[0], *(flag for flags in per_projection for flag in flags)]
        dx, *lists = lora_projections_backward(
            grads, x, weights, lora_a, lora_b, xas, scaling, ctx.p, rng, packed, packed_dx, need
        )
        wanted = [
            [g if n else None for g, n in zip(gradients, flags, strict=True)]
            for gradients, flags in zip(lists, [*needs[1:4], asked_biases, needs[5]], strict=True)
        ]
        nothing = [[None] * len(packed), [None] * len(packed_dx)]
        return (dx if needs[0] else None, *wanted, None, None, *nothing)
