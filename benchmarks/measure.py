"""From a case to its figures: gate, peers, probes, one interleaved run.

A family's module ``bench_<family>.py`` gives

    OP                                 the op's name
    CASES                              {"cpu": (Case, ...), "cuda": (Case, ...)}
    QUICK                              the one case of ``--quick``
    prepare(case, device, peers)       -> Workload
    FIGURES                            {name: call} of figures other than speed, for bars.toml: a
                                       call gives numbers by key, or why one is not at hand
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch

from pyfastft.benchmarks import probe
from pyfastft.benchmarks.timer import (
    MIN_ROUNDS,
    Candidate,
    CudaClock,
    WallClock,
    interleave,
    quiet_rounds,
    ratio_of_medians,
    summarise,
)

FAMILIES = ("lora", "ptq4")
# Measured by the figures of their bars alone.
FIGURES_ONLY = ("masked", "prune")
OURS = "pyfastft"
PEERS = ("pytorch", "torch.compile", "peft")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# On a GPU operands rotate through this many times the L2 cache, in at most this many sets.
_CACHE_MULTIPLE = 3
_MOST_SETS = 16


@dataclass(frozen=True)
class Case:
    """One op, forward and backward, at one shape.

    Attributes:
        shape: (M, K, N): tokens, in, out.
        rank: R of the low-rank update.
        p: dropout probability.
        dtype: a key of :data:`DTYPES`.
    """

    shape: tuple[int, int, int]
    rank: int
    p: float
    dtype: str

    def __str__(self) -> str:
        m, k, n = self.shape
        return f"M={m} K={k} N={n} R={self.rank} p={self.p:g} {self.dtype}"


@dataclass
class Workload:
    """A case made ready to run on one set of operands.

    Attributes:
        steps: by provider, ours and every peer at hand: one call does the whole work.
        absent: the peers that are not at hand, and why.
        gate: raises AssertionError unless ours is accurate and the peers compute the same.
        backend: which of our backends runs.
        flops: floating-point operations of the work.
        bytes: memory traffic that the work cannot do without.
    """

    steps: dict[str, Callable[[], Any]]
    absent: dict[str, str]
    gate: Callable[[], None]
    backend: str
    flops: int
    bytes: int


@dataclass
class Row:
    """The figures of one case; what is written to the results. Times in milliseconds."""

    op: str
    case: Case
    backend: str
    match: bool
    error: str | None = None
    absent: dict[str, str] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    rounds: int = 0
    rounds_disturbed: int = 0
    median_ms: dict[str, float] = field(default_factory=dict)
    iqr_ms: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    roofline: dict[str, Any] = field(default_factory=dict)
    samples_s: dict[str, list[float]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Without the single samples: a result is read by people too."""
        record = asdict(self)
        del record["samples_s"]
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Row:
        case = dict(record["case"])
        case["shape"] = tuple(case["shape"])
        return cls(**{**record, "case": Case(**case)})


def family(name: str) -> ModuleType:
    """The module that says what a family's benchmark is."""
    return importlib.import_module(f"pyfastft.benchmarks.bench_{name}")


def measure(
    module: ModuleType,
    case: Case,
    device: torch.device,
    *,
    peers: Collection[str] = PEERS,
    budget_s: float = 15.0,
    min_rounds: int = MIN_ROUNDS,
) -> Row:
    """Gate a case, then time it beside its peers and the machine's own limits.

    Args:
        module: of :func:`family`.
        case: what is measured.
        device: where.
        peers: which of :data:`PEERS` take part.
        budget_s: about how long the rounds may take.
        min_rounds: at least this many rounds.

    Returns:
        The figures; where the gate fails, a row with ``match`` False, the reason and no figure.
    """
    if "torch.compile" in peers:
        torch._dynamo.reset()
    torch.manual_seed(0)
    first = module.prepare(case, device, peers)
    row = Row(module.OP, case, first.backend, match=False, absent=first.absent)
    try:
        first.gate()
    except AssertionError as error:
        row.error = str(error)
        return row
    row.match, row.flops, row.bytes = True, first.flops, first.bytes

    sets = [first]
    for _ in range(operand_sets(first.bytes, device) - 1):
        sets.append(module.prepare(case, device, peers))
    candidates = {name: Candidate([one.steps[name] for one in sets]) for name in first.steps}
    arithmetic = probe.arithmetic(DTYPES[case.dtype], device)
    reading = probe.reading(first.bytes * len(sets), device)
    probes = {"arithmetic": arithmetic.candidate, "reading": reading.candidate}
    times, row.rounds_disturbed = quiet_times(
        {**probes, **candidates}, device, budget_s=budget_s, min_rounds=min_rounds
    )
    row.rounds = len(times[OURS])

    row.samples_s = {name: times[name] for name in candidates}
    for name in candidates:
        summary = summarise(times[name])
        row.median_ms[name] = _digits(summary.median * 1e3)
        row.iqr_ms[name] = _digits(summary.iqr * 1e3)
        row.gflops[name] = _digits(row.flops / summary.median / 1e9)
        if name != OURS:
            ratio = ratio_of_medians(times[name], times[OURS])
            row.speedup[name] = (_digits(ratio.value), _digits(ratio.low), _digits(ratio.high))
    peak = arithmetic.work / summarise(times["arithmetic"]).median
    rate = reading.work / summarise(times["reading"]).median
    floor_s = max(row.flops / peak, row.bytes / rate)
    row.roofline = {
        "peak_gflops": _digits(peak / 1e9),
        "peak_how": arithmetic.how,
        "read_gbytes": _digits(rate / 1e9),
        "read_how": reading.how,
        "bound": "arithmetic" if row.flops / peak >= row.bytes / rate else "memory",
        "percent": {name: _digits(1e5 * floor_s / ms) for name, ms in row.median_ms.items()},
    }
    return row


def quiet_times(
    candidates: Mapping[str, Candidate], device: torch.device, *, budget_s: float, min_rounds: int
) -> tuple[dict[str, list[float]], int]:
    """Seconds per call in the rounds in which nobody else had the machine, and how many were not.

    Args:
        candidates: by name; "arithmetic" is the probe that tells the rounds apart.
        device: where they run.
        budget_s: about how long the rounds may take.
        min_rounds: at least this many rounds.
    """
    times = interleave(
        candidates,
        clock=CudaClock() if device.type == "cuda" else WallClock(),
        budget_s=budget_s,
        min_rounds=min_rounds,
    )
    every = len(times["arithmetic"])
    quiet = quiet_rounds(times["arithmetic"])
    if len(quiet) < min(MIN_ROUNDS, every):
        quiet = list(range(every))
    kept = {name: [samples[index] for index in quiet] for name, samples in times.items()}
    return kept, every - len(quiet)


def medians(
    steps: Mapping[str, Callable[[], Any]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    budget_s: float = 10.0,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, float]:
    """Median seconds of each call, interleaved with each other and with the probe of the peak.

    "peak" beside them is the probe's rate, in operations per second.
    """
    arithmetic = probe.arithmetic(dtype, device)
    candidates = {name: Candidate([step]) for name, step in steps.items()}
    times, _ = quiet_times(
        {"arithmetic": arithmetic.candidate, **candidates},
        device,
        budget_s=budget_s,
        min_rounds=min_rounds,
    )
    found = {name: summarise(samples).median for name, samples in times.items()}
    return {"peak": arithmetic.work / found.pop("arithmetic"), **found}


def operand_sets(footprint: int, device: torch.device) -> int:
    """How many sets of operands a GPU's cache cannot hold; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_SETS, max(1, math.ceil(_CACHE_MULTIPLE * cache / footprint)))


def _digits(value: float) -> float:
    """Four significant digits: more would be noise, and would make every result file new."""
    return float(f"{value:.4g}")
