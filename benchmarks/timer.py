"""The one timer: candidates take turns, A B C A B C ..., so that a machine's moods hit all alike.

A *round* holds one sample of every candidate; a sample is the mean time of a few calls in a row.
Quote medians, and ratios of medians, of one run only.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

MIN_SAMPLE_S = 2e-3  # a thousand times what reading the clock costs
MIN_ROUNDS = 7
MAX_ROUNDS = 101
QUIET_SHARE = 0.9  # of the probe's better rates: below it, somebody else had the machine


@dataclass(frozen=True)
class Candidate:
    """What takes part in a run.

    Attributes:
        steps: calls that do the same work on buffers of their own; taken in turns, so that on a
            GPU no operand is still in the cache from the call before.
        before: runs before every sample, untimed.
    """

    steps: Sequence[Callable[[], Any]]
    before: Callable[[], None] = lambda: None


class Clock(Protocol):
    """Times spans of work; reads them together at the end of a round."""

    def start(self) -> Any: ...
    def stop(self, started: Any) -> Any: ...
    def seconds(self, spans: Sequence[Any]) -> list[float]: ...


class WallClock:
    """For work that is done when the call returns."""

    def start(self) -> float:
        return time.perf_counter()

    def stop(self, started: float) -> float:
        return time.perf_counter() - started

    def seconds(self, spans: Sequence[float]) -> list[float]:
        return list(spans)


class CudaClock:
    """Events in the current stream; waits for the device once a round, between no two samples."""

    def start(self) -> torch.cuda.Event:
        return self._mark()

    def stop(self, started: torch.cuda.Event) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return started, self._mark()

    def seconds(self, spans: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in spans]

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    clock: Clock,
    budget_s: float,
    min_sample_s: float = MIN_SAMPLE_S,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, list[float]]:
    """Time every candidate once per round.

    Args:
        candidates: by name; they run in this order.
        clock: how a span is timed.
        budget_s: about how long all the rounds may take; ``min_rounds`` are run whatever they cost.
        min_sample_s: short calls are repeated within a sample until it takes this long.
        min_rounds: at least this many rounds.
        max_rounds: at most this many.

    Returns:
        Seconds per call; one list per candidate, one entry per round.
    """
    turns = {name: itertools.cycle(one.steps) for name, one in candidates.items()}

    def sample(name: str, calls: int) -> Any:
        steps = turns[name]
        candidates[name].before()
        started = clock.start()
        for _ in range(calls):
            next(steps)()
        return clock.stop(started)

    # The warm-up also finds out how many calls fill a sample.
    calls = dict.fromkeys(candidates, 1)
    cost_s = 0.0
    for name, one in candidates.items():
        clock.seconds([sample(name, len(one.steps) + 1)])
        while True:
            (spent,) = clock.seconds([sample(name, calls[name])])
            if spent >= min_sample_s:
                break
            missing = min_sample_s / spent if spent > 0 else 10.0
            calls[name] = math.ceil(calls[name] * min(10.0, 1.2 * missing))
        cost_s += spent
    rounds = min(max_rounds, max(min_rounds, int(budget_s / cost_s)))

    times: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            spans = [sample(name, calls[name]) for name in candidates]
            for name, spent in zip(candidates, clock.seconds(spans), strict=True):
                times[name].append(spent / calls[name])
    finally:
        if collects:
            gc.enable()
    return times


def quiet_rounds(probe: Sequence[float]) -> list[int]:
    """The rounds in which a probe of constant work ran at nearly its best rate.

    Chosen by the probe alone, so neither ours nor a peer is favoured. Its best is the first decile:
    the one fastest sample may be a burst of the clock rate.
    """
    best = float(np.quantile(probe, 0.1))
    return [index for index, spent in enumerate(probe) if best >= QUIET_SHARE * spent]


@dataclass(frozen=True)
class Summary:
    """Median and inter-quartile range, in the samples' unit."""

    median: float
    iqr: float


def summarise(samples: Sequence[float]) -> Summary:
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return Summary(float(middle), float(high - low))


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % interval."""

    value: float
    low: float
    high: float


def ratio_of_medians(
    numerator: Sequence[float], denominator: Sequence[float], *, resamples: int = 2000
) -> Ratio:
    """median(numerator) / median(denominator); the interval by bootstrap over whole rounds."""
    above, below = np.asarray(numerator), np.asarray(denominator)
    drawn = np.random.default_rng(0).integers(len(above), size=(resamples, len(above)))
    ratios = np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(float(np.median(above) / np.median(below)), float(low), float(high))
