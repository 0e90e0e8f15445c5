"""What training some entries of a model's weights will take, before anything is trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from pyfastft import optim, sparsity
from pyfastft._check import reject
from pyfastft._op import explain
from pyfastft._targets import plan as targeted
from pyfastft._targets import untied
from pyfastft.config import MaskedTuning
from pyfastft.functional import masked as functional
from pyfastft.ops.masked._rectangles import matrix_of
from pyfastft.tuning import why_not

__all__ = ["Cost", "LayerPlan", "ModelPlan", "plan"]

# Weights of one kind are stepped together, as an optimizer does, up to this many entries.
_STEPPED = 1 << 24
# From this part of the dense time on a mask is no faster.
_EVEN = 0.95
_BUDGET_S = 0.25
_HEAD = ("layer", "shape", "trained", "MB held", "MB saved", "dW ms", "step ms", "ms")


@dataclass(frozen=True)
class Cost:
    """What one layer takes in a training step.

    Attributes:
        held: bytes beside the weight for as long as training lasts: gradient, AdamW's state, and
            what a set keeps.
        saved: bytes of the input that the forward keeps for the weight's gradient. Where they are
            the whole input, other layers may hold the same memory.
        forward, input_gradient, weight_gradient, step: milliseconds.
    """

    held: int
    saved: int
    forward: float
    input_gradient: float
    weight_gradient: float
    step: float

    @property
    def total(self) -> float:
        """Milliseconds of all."""
        return self.forward + self.input_gradient + self.weight_gradient + self.step


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a :class:`ModelPlan`.

    Attributes:
        name: the module's.
        shape: (N, K) of its weight.
        trained: how many entries train.
        cost: as the config trains it.
        full: where all of the weight trains, by PyTorch and its fused AdamW.
        backend: which of an op's backends computes the weight's gradient.
        note: where the mask saves no time, why.
    """

    name: str
    shape: tuple[int, int]
    trained: int
    cost: Cost
    full: Cost
    backend: str
    note: str


@dataclass(frozen=True)
class ModelPlan:
    """What :func:`plan` returns; ``print`` shows layers that cost the same as one line.

    Attributes:
        layers: the targeted layers, in the model's order.
        skipped: what was targeted and would be left alone, with the reasons.
    """

    layers: tuple[LayerPlan, ...]
    skipped: Mapping[str, str]

    @property
    def cost(self) -> Cost:
        """Of all targeted layers."""
        return _sum([layer.cost for layer in self.layers])

    @property
    def full(self) -> Cost:
        """Of all of them where they train whole."""
        return _sum([layer.full for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "cost": asdict(self.cost), "full": asdict(self.full)}

    def __str__(self) -> str:
        grouped: dict[tuple[Any, ...], list[LayerPlan]] = {}
        for layer in self.layers:
            what = _pattern(layer.name)
            grouped.setdefault((what, layer.shape), []).append(layer)
        rows: list[tuple[str, ...]] = [_HEAD]
        notes: dict[str, None] = {}
        for (_, (n, k)), same in grouped.items():
            what = _pattern(same[0].name) if len(same) > 1 else same[0].name
            cost, full = (_sum([getattr(one, w) for one in same]) for w in ("cost", "full"))
            trained = sum(layer.trained for layer in same)
            label = f"{len(same)} x {what}" if len(same) > 1 else what
            rows.append((label, f"{n} x {k}", f"{trained:,}", *_beside(cost, full)))
            notes |= dict.fromkeys(f"{what}: {one.note}" for one in same if one.note)
        every = sum(layer.trained for layer in self.layers)
        rows.append(("all", "", f"{every:,}", *_beside(self.cost, self.full)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        lines.append("a step of these layers alone; in brackets, were they trained whole")
        lines += [f"  {note}" for note in notes]
        lines += [f"  left alone, {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def plan(model: nn.Module, config: MaskedTuning, *, batch: int, seq: int = 1) -> ModelPlan:
    """Bytes and milliseconds of every layer that a config would train, and the kernel that runs.

    The milliseconds are measured here and now: each kernel runs on random data of each distinct
    layer's shape, beside the dense one. Nothing of the model changes. Where the choice waits for a
    calibration, the entries are taken to fall evenly on all layers; SaRA's are counted. What is
    between the targeted layers is not part of the plan.

    Args:
        model: as for :func:`pyfastft.convert`, not converted.
        config: what would train.
        batch, seq: a layer sees batch * seq tokens in a step.

    Raises:
        ValueError: as :func:`pyfastft.convert` for the targets; or batch or seq is below 1.
        TypeError: the config is of another kind.

    Example:
        >>> print(ft.plan(model, ft.MaskedTuning(density=0.01), batch=8, seq=128))
    """
    if not isinstance(config, MaskedTuning):
        reject("plan", "config", "type MaskedTuning", type(config).__name__, error=TypeError)
    for name, value in (("batch", batch), ("seq", seq)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            reject("plan", name, "at least 1", repr(value))
    found = targeted(model, config, caller="plan", why_not=why_not(config))
    modules, skipped = untied(model, found.modules)
    weights = {name: module.get_parameter("weight") for name, module in modules.items()}
    counts = _counts(config, weights)
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in weights.items():
        part = float(f"{counts[name] / max(weight.numel(), 1):.2g}")
        kind = (matrix_of(weight), weight.dtype, weight.device, part)
        kinds.setdefault(kind, []).append(name)
    problems = [
        (_Problem(torch.empty(shape, dtype=dtype, device=device), config, part, batch * seq), names)
        for (shape, dtype, device, part), names in kinds.items()
    ]
    rates = _step_rates([(one, len(names)) for one, names in problems])
    planned = {
        name: one.plan(name, counts[name], rates) for one, names in problems for name in names
    }
    return ModelPlan(tuple(planned[name] for name in modules), {**found.skipped, **skipped})


def _counts(config: MaskedTuning, weights: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """How many entries of each weight would train."""
    if config.method == "sara" and config.threshold is not None:
        return {n: int((w.detach().abs() < config.threshold).sum()) for n, w in weights.items()}
    assert config.density is not None
    if config.method == "sara":
        k = round(config.density * sum(weight.numel() for weight in weights.values()))
        tensors = [weight.detach() for weight in weights.values()]
        found = functional.select_topk(tensors, k, largest=False)
        return {name: one.numel() for name, one in zip(weights, found, strict=True)}
    return {name: round(config.density * weight.numel()) for name, weight in weights.items()}


class _Problem:
    """One kind of layer on random data, of which a part trains."""

    def __init__(
        self, weight: torch.Tensor, config: MaskedTuning, part: float, tokens: int
    ) -> None:
        n, k = self.shape = matrix_of(weight)
        self.layout = config.layout
        self.one = _draw(weight.normal_(), config, part)
        self.x = weight.new_empty(tokens, k).normal_()
        self.grad = weight.new_empty(tokens, n).normal_()
        self.times = medians(
            {
                "forward": lambda: nn.functional.linear(self.x, weight),
                "input_gradient": lambda: self.grad @ weight,
                "weight_gradient": self._gradient,
                "dense": lambda: self.grad.T @ self.x,
            },
            weight.device,
        )

    def plan(self, name: str, trained: int, rates: tuple[float, float]) -> LayerPlan:
        """The plan of a layer of this kind; the rates are of :func:`_step_rates`."""
        one, (n, k), tokens, size = self.one, self.shape, len(self.x), self.x.element_size()
        saved = k if one.saved_columns is None else one.saved_columns.numel()
        # Beside index and value a gradient and two moments.
        each = one.nbytes / max(len(one), 1) + 3 * one.values.element_size()
        forward, input_gradient, gradient, dense = self.times.values()
        both = (forward, input_gradient)
        step, dense_step = trained * rates[0], n * k * rates[1]
        cost = Cost(round(trained * each), tokens * saved * size, *both, gradient, step)
        full = Cost(3 * n * k * size, tokens * k * size, *both, dense, dense_step)
        backend = explain("masked_weight_grad", *self._arguments()).chosen
        note = _note(self.layout, one.density, cost, full)
        return LayerPlan(name, self.shape, trained, cost, full, str(backend), note)

    def _arguments(self) -> tuple[Any, ...]:
        one = self.one
        x = self.x if one.saved_columns is None else self.x[:, one.saved_columns]
        return self.grad, x, one.saved_index, one.rows, one.columns

    def _gradient(self) -> torch.Tensor:
        grad, x, index, rows, columns = self._arguments()
        return functional.masked_weight_grad(grad, x, index, rows=rows, columns=columns)


def _step_rates(problems: Sequence[tuple[_Problem, int]]) -> tuple[float, float]:
    """Milliseconds of a step by value, of MaskedAdamW and of PyTorch's fused AdamW of everything:
    as many layers of every kind as the model has, or a like share of them where that is large."""
    total = sum(layers * one.one.weight.numel() for one, layers in problems)
    share = min(1.0, _STEPPED / max(total, 1))
    sets, whole = [], []
    for one, layers in problems:
        for _ in range(max(1, int(share * layers))):
            sets.append(copy.deepcopy(one.one))
            sets[-1].values.grad = torch.randn_like(sets[-1].values)
            whole.append(nn.Parameter(one.one.weight.detach().clone()))
            whole[-1].grad = torch.randn_like(whole[-1])
    ours = optim.MaskedAdamW(sets, lr=1e-6)
    dense = torch.optim.AdamW(whole, lr=1e-6, fused=True)
    times = medians({"ours": ours.step, "dense": dense.step}, sets[0].weight.device)
    trained, every = sum(map(len, sets)), sum(one.numel() for one in whole)
    return times["ours"] / max(trained, 1), times["dense"] / max(every, 1)


def medians(steps: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Milliseconds of each call, taken in turns."""
    from pyfastft.benchmarks.timer import Candidate, CudaClock, WallClock, interleave, summarise

    with torch.no_grad():
        times = interleave(
            {name: Candidate([step]) for name, step in steps.items()},
            clock=CudaClock() if device.type == "cuda" else WallClock(),
            budget_s=_BUDGET_S,
            min_sample_s=5e-4,
        )
    return {name: 1e3 * summarise(samples).median for name, samples in times.items()}


def _draw(weight: torch.Tensor, config: MaskedTuning, part: float) -> sparsity.SparseSet:
    """A random set of the config's layout, of about this part of the weight."""
    if config.layout == "element":
        return sparsity.select([weight], part, score="random")[0]
    n, k = matrix_of(weight)
    groups = {
        "rows": n,
        "columns": k,
        "blocks": n // config.block * (k // config.block),
    }[config.layout]
    numbers = torch.randperm(groups, device=weight.device)[: max(1, round(part * groups))]
    if config.layout == "blocks":
        return sparsity.blocks(weight, numbers, (config.block, config.block))
    return (sparsity.rows if config.layout == "rows" else sparsity.columns)(weight, numbers)


def _note(layout: str, density: float, cost: Cost, full: Cost) -> str:
    """Why a mask saves no time, where it saves none."""
    slow = [
        what
        for what, name in (("gradient", "weight_gradient"), ("step", "step"))
        if getattr(cost, name) >= _EVEN * getattr(full, name)
    ]
    if not slow:
        return ""
    what = {"element": "single entries"}.get(layout, layout)
    advice = "rows, columns or blocks can be" if layout == "element" else "a lower density can be"
    return f"{what} at {density:.3g} are no faster than dense ({', '.join(slow)}); {advice}"


def _pattern(name: str) -> str:
    """A module's name without the numbers of layers."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(**{f.name: sum(getattr(one, f.name) for one in costs) for f in fields(Cost)})


def _beside(cost: Cost, full: Cost) -> tuple[str, ...]:
    """The columns of a row: what the mask takes, and what all of the weight would."""
    pairs = (
        *((cost.held / 1e6, full.held / 1e6), (cost.saved / 1e6, full.saved / 1e6)),
        (cost.weight_gradient, full.weight_gradient),
        (cost.step, full.step),
        (cost.total, full.total),
    )
    return tuple(f"{ours:.3g} ({theirs:.3g})" for ours, theirs in pairs)
