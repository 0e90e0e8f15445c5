"""What DoRA and PEGO ask of the ops, beside PEFT's layer and the authors' expression."""

from __future__ import annotations

import itertools

import torch

import pyfastft as ft
from pyfastft import ops
from pyfastft.benchmarks.lora.layer import SCALING, Operands, peft_layer
from pyfastft.benchmarks.measure import DTYPES, OURS, Case, medians
from pyfastft.testing.tolerance import assert_accurate

_GROUP = 4  # PEGO's adapters per projection


def dora(case: Case, device: torch.device) -> dict[str, float]:
    """A DoRA layer over PEFT's, forward and backward; the gradients of x, A, B and magnitude."""
    torch.manual_seed(0)
    drawn = Operands.draw(case, device)
    layer = peft_layer(drawn, case.p, use_dora=True)
    magnitude = layer.lora_magnitude_vector["default"].weight
    x, w, a, b = drawn.x, drawn.weight, drawn.lora_a, drawn.lora_b
    wanted = (x, a, b, magnitude)
    squared = w.float().square().sum(1)  # of the frozen weight: once

    def ours() -> tuple[torch.Tensor, ...]:
        y = ft.functional.dora_linear(
            x, w, a, b, magnitude, scaling=drawn.scaling, p=case.p, squared=squared
        )
        return y, *torch.autograd.grad(y, wanted, drawn.grad)

    def pefts() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, wanted, drawn.grad)

    def naive(wide: bool) -> tuple[torch.Tensor, ...]:
        values = [x, w, a, b, magnitude, drawn.grad]
        values = [v.detach().double() if wide else v.detach() for v in values]
        x_, w_, a_, b_, m_, grad = values
        for leaf in (x_, a_, b_, m_):
            leaf.requires_grad_()
        merged = w_ + SCALING * b_ @ a_
        y = (m_ / merged.norm(dim=1).detach()) * (x_ @ w_.T + SCALING * (x_ @ a_.T) @ b_.T)
        return y, *torch.autograd.grad(y, (x_, a_, b_, m_), grad)

    if case.p == 0:
        names = ("y", "dx", "dA", "dB", "dm")
        for name, mine, truth, plain in zip(names, ours(), naive(True), naive(False), strict=True):
            detached = (mine.detach(), truth.detach(), plain.detach())
            assert_accurate(*detached, gradient=name != "y", what=name)
    times = medians({OURS: ours, "peft": pefts}, DTYPES[case.dtype], device)
    return {"peft": times["peft"] / times[OURS]}


def pego(case: Case, device: torch.device) -> dict[str, float]:
    """PEGO's losses of one projection (K = N), value and gradients, over the authors' expression.

    Source: Hu et al., "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal
    Regularization for Domain Generalization", ECCV 2024; their released code.
    """
    torch.manual_seed(0)
    drawn = [Operands.draw(case, device) for _ in range(_GROUP)]
    weight = drawn[0].weight
    pairs = [(one.lora_a, one.lora_b) for one in drawn]
    wanted = [value for pair in pairs for value in pair]

    def ours() -> tuple[torch.Tensor, ...]:
        loss = torch.zeros((), device=device)
        for a, b in pairs:
            loss = loss + ops.abs_row_sums(weight @ a.T, b, None).sum()
        for (a, b), (other_a, other_b) in itertools.combinations(pairs, 2):
            loss = loss + ops.abs_row_sums(b @ (a @ other_a.T), other_b, None).sum()
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    def authors() -> tuple[torch.Tensor, ...]:
        loss = torch.zeros((), device=device)
        for a, b in pairs:
            loss = loss + (weight @ (b @ a).T).abs().sum()
        for (a, b), (other_a, other_b) in itertools.combinations(pairs, 2):
            loss = loss + ((b @ a) @ (other_b @ other_a).T).abs().sum()
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    mine, theirs = ours()[0], authors()[0]
    if not torch.isclose(mine.double(), theirs.double(), rtol=1e-2):
        raise AssertionError(f"the loss is {mine.item()}, the authors' expression gives {theirs}")
    times = medians({OURS: ours, "authors": authors}, DTYPES[case.dtype], device)
    return {"authors": times["authors"] / times[OURS]}
