"""The lora family: one adapted linear layer, forward and backward, beside what people use today.

The base weight is frozen; gradients go to x, A and B, as in fine-tuning. The peers have the same
weights: PyTorch's eager expression, torch.compile of it, and PEFT's layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

import pyfastft as ft
from pyfastft.benchmarks.gemm import gemm
from pyfastft.benchmarks.lora import grid, methods, model, several
from pyfastft.benchmarks.lora.layer import (
    Operands,
    compiled_expression,
    dropped_expression,
    gate,
    peft_layer,
    saved_bytes,
)
from pyfastft.benchmarks.measure import DTYPES, OURS, Case, Workload
from pyfastft.benchmarks.timer import Candidate, WallClock, interleave, summarise

OP = "lora_linear"
_SHAPES = (
    ((512, 1024, 1024), 16, 0.1),
    ((2048, 1024, 4096), 16, 0.1),
    ((512, 384, 1536), 8, 0.1),
    ((1, 4096, 4096), 16, 0.0),
)
_LANGUAGE_MODEL_SHAPES = (
    ((8192, 4096, 4096), 16, 0.1),
    ((4096, 4096, 14336), 64, 0.05),
)
CASES = {
    "cpu": tuple(Case(*shape, dtype) for dtype in ("float32", "bfloat16") for shape in _SHAPES),
    "cuda": tuple(
        Case(*shape, dtype)
        for dtype in ("bfloat16", "float32")
        for shape in (*_SHAPES, *_LANGUAGE_MODEL_SHAPES)
    ),
}
QUICK = Case((512, 384, 1536), 8, 0.1, "float32")


def _cost(case: Case) -> tuple[int, int]:
    """Operations, and bytes that a forward and a backward cannot avoid to read and write."""
    (m, k, n), r = case.shape, case.rank
    flops = 4 * m * k * n + 6 * m * r * (k + n)
    parameters = n * k + r * (k + n)
    forward = m * k + parameters + m * n + m * r
    backward = m * n + m * k + m * r + parameters + m * k + r * (k + n)
    return flops, (forward + backward) * DTYPES[case.dtype].itemsize


def prepare(case: Case, device: torch.device, peers: Collection[str]) -> Workload:
    """See :mod:`pyfastft.benchmarks.measure`."""
    drawn = Operands.draw(case, device)
    x, weight, a, b, p = drawn.x, drawn.weight, drawn.lora_a, drawn.lora_b, case.p
    forwards: dict[str, Callable[[], torch.Tensor]] = {OURS: lambda: drawn.ours(p)}
    absent: dict[str, str] = {}
    if "pytorch" in peers:
        forwards["pytorch"] = lambda: dropped_expression(x, weight, a, b, p)
    if "torch.compile" in peers:
        compiled = compiled_expression()
        try:
            drawn.step(lambda: compiled(x, weight, a, b, p))
            forwards["torch.compile"] = lambda: compiled(x, weight, a, b, p)
        except Exception as error:  # whatever the compiler's toolchain raises
            absent["torch.compile"] = f"cannot be used: {_brief(error)}"
    layer = None
    if "peft" in peers:
        try:
            layer = peft_layer(drawn, p)
            forwards["peft"] = lambda: layer(x)
        except Exception as error:  # a package that PEFT imports may raise anything
            absent["peft"] = f"cannot be used: {_brief(error)}"

    flops, size = _cost(case)
    rng = torch.tensor([1, 2], device=device)
    return Workload(
        steps={name: lambda f=forward: drawn.step(f) for name, forward in forwards.items()},
        absent=absent,
        gate=lambda: gate(drawn, p, layer),
        backend=str(ft.explain(OP, x, weight, a, b, None, drawn.scaling, p, rng).chosen),
        flops=flops,
        bytes=size,
    )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def saved_for_backward(case: Case, device: torch.device) -> dict[str, float]:
    """Bytes that one forward keeps for its backward, x included, parameters excluded."""
    operands = Operands.draw(case, device)
    held = operands.parameters()
    found = {OURS: saved_bytes(lambda: operands.ours(case.p), held)}
    try:
        layer = peft_layer(operands, case.p)
    except ImportError:
        return found
    found["peft"] = saved_bytes(lambda: layer(operands.x), held)
    return {**found, "of peft": found[OURS] / found["peft"]}


def runs_that_differ(case: Case, device: torch.device) -> dict[str, float]:
    """Of ten runs with one mask, how many give other bits than the first, gradients included."""
    operands = Operands.draw(case, device)
    rng = torch.tensor([1, 2], device=device)
    first = operands.step(lambda: operands.ours(case.p, rng))
    differing = 0
    for _ in range(9):
        again = operands.step(lambda: operands.ours(case.p, rng))
        differing += not all(map(torch.equal, first, again))
    return {"differing": float(differing)}


def call_overhead(case: Case, device: torch.device) -> dict[str, float]:
    """Microseconds of a forward call, with the graph recorded, at a shape that costs nothing."""
    return _call_us(case, device, gradient=True)


def call_overhead_without_gradient(case: Case, device: torch.device) -> dict[str, float]:
    """Microseconds of a forward call under ``torch.no_grad``."""
    return _call_us(case, device, gradient=False)


def _call_us(case: Case, device: torch.device, *, gradient: bool) -> dict[str, float]:
    operands = Operands.draw(case, device)
    x, w, a, b = operands.x, operands.weight, operands.lora_a, operands.lora_b
    scaling, p = operands.scaling, case.p
    forwards: dict[str, Callable[[], Any]] = {
        OURS: lambda: ft.lora_linear(x, w, a, b, scaling=scaling, p=p),
        "pytorch": lambda: dropped_expression(x, w, a, b, p),
    }
    with torch.set_grad_enabled(gradient):
        times = interleave(
            {name: Candidate([forward]) for name, forward in forwards.items()},
            clock=WallClock(),  # the caller's time: nothing waits for the device
            budget_s=3.0,
        )
    return {name: summarise(samples).median * 1e6 for name, samples in times.items()}


FIGURES = {
    "saved_for_backward": saved_for_backward,
    "saved_projections": several.saved_projections,
    "runs_that_differ": runs_that_differ,
    "call_overhead": call_overhead,
    "call_overhead_without_gradient": call_overhead_without_gradient,
    "gemm": gemm,
    "grid": grid.grid,
    "share": grid.share,
    "training_step": model.training_step,
    "projections": several.projections,
    "adapters": several.adapters,
    "dora": methods.dora,
    "pego": methods.pego,
}


def bench_lora_linear(record: Callable[[Case], None], case: Case) -> None:
    """Forward and backward; the peers' figures are in extra_info."""
    record(case)
