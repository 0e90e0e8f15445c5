"""Several projections of one input, and several adapters in one batch, beside one at a time."""

from __future__ import annotations

import torch

from pyfastft import ops
from pyfastft._random import draw_rng
from pyfastft.benchmarks.lora.layer import Operands, gate, peft_layer, saved_bytes
from pyfastft.benchmarks.measure import DTYPES, OURS, Case, medians
from pyfastft.testing.tolerance import assert_accurate

_PROJECTIONS = 3
_ADAPTERS = 4


def _draw(case: Case, device: torch.device, count: int) -> list[Operands]:
    torch.manual_seed(0)
    return [Operands.draw(case, device) for _ in range(count)]


def projections(case: Case, device: torch.device) -> dict[str, float]:
    """q, k and v as one op over three of PEFT's layers, and over three of our own."""
    drawn = _draw(case, device, _PROJECTIONS)
    x = drawn[0].x
    for one in drawn:
        one.x = x
    layers = [peft_layer(one, case.p) for one in drawn]
    gate(drawn[0], case.p, layers[0])
    weights = [one.weight for one in drawn]
    lora_a, lora_b = [one.lora_a for one in drawn], [one.lora_b for one in drawn]
    nothing = [x.new_empty(0)] * _PROJECTIONS
    scaling, grads = [one.scaling for one in drawn], [one.grad for one in drawn]
    wanted = [x, *lora_a, *lora_b]

    def one_op(p: float = case.p) -> tuple[torch.Tensor, ...]:
        rng = draw_rng(device) if p else None
        ys, _ = ops.lora_projections(
            x, weights, lora_a, lora_b, nothing, scaling, [p] * _PROJECTIONS, rng, [], []
        )
        return torch.autograd.grad(ys, wanted, grads)

    def three(own: bool) -> tuple[torch.Tensor, ...]:
        ys = [
            one.ours(case.p) if own else layer(x) for one, layer in zip(drawn, layers, strict=True)
        ]
        return torch.autograd.grad(ys, wanted, grads)

    _hold_to_sum(one_op(0.0), drawn)
    times = medians(
        {OURS: one_op, "peft": lambda: three(False), "three of ours": lambda: three(True)},
        DTYPES[case.dtype],
        device,
    )
    return {
        "peft": times["peft"] / times[OURS],
        "three of ours": times["three of ours"] / times[OURS],
    }


def saved_projections(case: Case, device: torch.device) -> dict[str, float]:
    """Bytes that a forward of q, k and v keeps for its backward, and their share of PEFT's."""
    drawn = _draw(case, device, _PROJECTIONS)
    x = drawn[0].x
    for one in drawn:
        one.x = x
    layers = [peft_layer(one, case.p) for one in drawn]
    weights = [one.weight for one in drawn]
    lora_a, lora_b = [one.lora_a for one in drawn], [one.lora_b for one in drawn]
    nothing, scaling = [x.new_empty(0)] * _PROJECTIONS, [one.scaling for one in drawn]
    rng, p = draw_rng(device), [case.p] * _PROJECTIONS

    def ours() -> object:
        return ops.lora_projections(x, weights, lora_a, lora_b, nothing, scaling, p, rng, [], [])

    held = [tensor for one in drawn for tensor in one.parameters()]
    bytes_of = {
        OURS: saved_bytes(ours, held),
        "peft": saved_bytes(lambda: [layer(x) for layer in layers], held),
    }
    return {**bytes_of, "of peft": bytes_of[OURS] / bytes_of["peft"]}


def _hold_to_sum(gradients: tuple[torch.Tensor, ...], drawn: list[Operands]) -> None:
    """Without dropout dX is the sum over projections; naively in the dtype, truly in float64."""

    def of(d: Operands, wide: bool) -> torch.Tensor:
        d = d.double() if wide else d
        return d.grad @ d.weight + d.grad @ d.lora_b @ d.lora_a * d.scaling.to(d.grad.dtype)

    def total(wide: bool) -> torch.Tensor:
        return torch.stack([of(d, wide).detach() for d in drawn]).sum(0)

    what = "dx of the projections"
    assert_accurate(gradients[0], total(True), total(False), gradient=True, what=what)


def adapters(case: Case, device: torch.device) -> dict[str, float]:
    """Four adapters in one batch over four passes of PEFT's layers, and of our own.

    The case's M is the whole batch; each adapter has a quarter of its rows.
    """
    drawn = _draw(case, device, _ADAPTERS)
    whole, weight = drawn[0], drawn[0].weight
    rows = case.shape[0] // _ADAPTERS
    x, grad = whole.x, whole.grad
    own_x = [x.detach()[j * rows : (j + 1) * rows].requires_grad_() for j in range(_ADAPTERS)]
    own_grad = list(grad.split(rows))
    for one, part, of_grad in zip(drawn, own_x, own_grad, strict=True):
        one.weight, one.x, one.grad = weight, part, of_grad
    layers = [peft_layer(one, case.p) for one in drawn]
    gate(drawn[1], case.p, layers[1])
    lora_a, lora_b = [one.lora_a for one in drawn], [one.lora_b for one in drawn]
    scaling = [one.scaling for one in drawn]
    wanted = [x, *lora_a, *lora_b]
    lengths = [rows] * _ADAPTERS

    def one_op(p: float = case.p) -> tuple[torch.Tensor, ...]:
        rng = draw_rng(device) if p else None
        y, _ = ops.lora_adapters(
            x, weight, lora_a, lora_b, None, scaling, [p] * _ADAPTERS, lengths, rng, None, None
        )
        return torch.autograd.grad(y, wanted, grad)

    def four(own: bool) -> None:
        for one, layer in zip(drawn, layers, strict=True):
            one.step(lambda: one.ours(case.p) if own else layer(one.x))  # noqa: B023

    dx = one_op(0.0)[0]
    for one, part in zip(drawn, dx.split(rows), strict=True):
        _hold_to_sum((part,), [one])
    times = medians(
        {OURS: one_op, "peft": lambda: four(False), "four of ours": lambda: four(True)},
        DTYPES[case.dtype],
        device,
    )
    return {
        "peft": times["peft"] / times[OURS],
        "four of ours": times["four of ours"] / times[OURS],
    }
