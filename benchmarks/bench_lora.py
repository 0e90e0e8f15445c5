"""The lora family: one adapted linear layer, forward and backward, beside what people use today.

The base weight is frozen; gradients go to x, A and B, as in fine-tuning. The peers have the same
weights: PyTorch's eager expression, torch.compile of it, and PEFT's layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import pyfastft as ft
from pyfastft.benchmarks.measure import DTYPES, OURS, Case, Workload
from pyfastft.benchmarks.timer import Candidate, WallClock, interleave, summarise
from pyfastft.reference._dropout import dropout
from pyfastft.testing.tolerance import assert_accurate

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

# A layer's alpha / R, as a tensor: what nn.LoRALinear holds.
_SCALING = 2.0


@dataclass
class Operands:
    """One set of operands; B is not zero, or half of the work could be wrong unseen."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def draw(cls, case: Case, device: torch.device) -> Operands:
        m, k, n = case.shape
        dtype = DTYPES[case.dtype]

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, device=device) * std).to(dtype)

        # Parameters where a layer has them.
        return cls(
            x=normal(m, k).requires_grad_(),
            weight=torch.nn.Parameter(normal(n, k, std=k**-0.5), requires_grad=False),
            lora_a=torch.nn.Parameter(normal(case.rank, k, std=k**-0.5)),
            lora_b=torch.nn.Parameter(normal(n, case.rank, std=case.rank**-0.5)),
            scaling=torch.full((), _SCALING, device=device),
            grad=normal(m, n),
        )

    def double(self) -> Operands:
        return Operands(
            *(
                value.detach().double().requires_grad_(value.requires_grad)
                for value in vars(self).values()
            )
        )

    @property
    def trained(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.lora_a, self.lora_b

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """What the layer holds anyway, whether or not something is saved for backward."""
        return self.weight, self.lora_a, self.lora_b, self.scaling

    def step(self, forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Forward and backward: y and the gradients of x, A, B."""
        y = forward()
        return y, *torch.autograd.grad(y, self.trained, self.grad)

    def ours(self, p: float, rng: torch.Tensor | None = None) -> torch.Tensor:
        return ft.lora_linear(
            self.x, self.weight, self.lora_a, self.lora_b, scaling=self.scaling, p=p, rng=rng
        )


def expression(
    x: torch.Tensor, x_hat: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """The layer as it is written by hand, for x_hat = dropout(x)."""
    return F.linear(x, weight) + F.linear(F.linear(x_hat, a), b) * _SCALING


def _dropped_expression(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, p: float
) -> torch.Tensor:
    return expression(x, F.dropout(x, p), weight, a, b)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    # One for all sets of operands: a second one would be compiled again.
    return torch.compile(_dropped_expression, fullgraph=True, dynamic=False)


def peft_layer(operands: Operands, p: float) -> Any:
    """PEFT's layer over nn.Linear with these very weights."""
    import peft

    n, k = operands.weight.shape
    base = torch.nn.Linear(k, n, bias=False, device="meta")
    base.weight = torch.nn.Parameter(operands.weight, requires_grad=False)
    rank = operands.lora_a.shape[0]
    config = peft.LoraConfig(
        r=rank, lora_alpha=int(_SCALING * rank), lora_dropout=p, target_modules=["0"]
    )
    adapted: Any = peft.inject_adapter_in_model(config, torch.nn.Sequential(base))
    layer = adapted[0]
    for holder, value in ((layer.lora_A, operands.lora_a), (layer.lora_B, operands.lora_b)):
        # A Parameter of the same storage would be another leaf; its gradient must be asked for.
        del holder["default"].weight
        holder["default"].weight = value
    return layer.train()


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
        forwards["pytorch"] = lambda: _dropped_expression(x, weight, a, b, p)
    if "torch.compile" in peers:
        compiled = _compiled()
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


def gate(operands: Operands, p: float, layer: torch.nn.Module | None = None) -> None:
    """Hold ours, with dropout, and PEFT's layer, without, to the float64 reference.

    Raises:
        AssertionError: an output or a gradient is not accurate.
    """
    rng = torch.tensor([1, 2], device=operands.x.device)
    mine = operands.step(lambda: operands.ours(p, rng))
    _hold(OURS, mine, operands, p, rng)
    if layer is not None:
        layer.eval()
        theirs = operands.step(lambda: layer(operands.x))
        layer.train()
        _hold("peft", theirs, operands, 0.0, rng)


def _hold(
    name: str, results: tuple[torch.Tensor, ...], operands: Operands, p: float, rng: torch.Tensor
) -> None:
    exact = operands.double()
    with ft.backend("reference"):
        truths = exact.step(lambda: exact.ours(p, rng))
    x, w = operands.x, operands.weight
    a, b = operands.lora_a, operands.lora_b
    naives = operands.step(lambda: expression(x, dropout(x, p, rng), w, a, b))
    for what, result, truth, naive in zip(
        ("y", "dx", "dA", "dB"), results, truths, naives, strict=True
    ):
        assert_accurate(
            result.detach(),
            truth.detach(),
            naive.detach(),
            gradient=what != "y",
            what=f"{name}: {what}",
        )


def saved_for_backward(case: Case, device: torch.device) -> dict[str, float]:
    """Bytes that one forward keeps for its backward, x included, parameters excluded."""
    operands = Operands.draw(case, device)
    forwards: dict[str, Callable[[], Any]] = {OURS: lambda: operands.ours(case.p)}
    try:
        layer = peft_layer(operands, case.p)
        forwards["peft"] = lambda: layer(operands.x)
    except ImportError:
        pass
    return {name: _saved_bytes(forward, operands) for name, forward in forwards.items()}


def _saved_bytes(forward: Callable[[], Any], operands: Operands) -> float:
    held = {tensor.untyped_storage().data_ptr() for tensor in operands.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return float(sum(storage.nbytes() for storage in saved.values()))


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
        "pytorch": lambda: _dropped_expression(x, w, a, b, p),
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
    "call_overhead": call_overhead,
    "call_overhead_without_gradient": call_overhead_without_gradient,
}


def bench_lora_linear(record: Callable[[Case], None], case: Case) -> None:
    """Forward and backward; the peers' figures are in extra_info."""
    record(case)
