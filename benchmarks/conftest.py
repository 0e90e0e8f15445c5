"""``pytest benchmarks``: every case as a row of pytest-benchmark's, by the same timer.

The fixture ``record`` measures a case and hands our samples to pytest-benchmark, which stores and
compares them; the peers' figures are in ``extra_info``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyfastft.benchmarks import machine
from pyfastft.benchmarks.measure import OURS, Case, measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        device = machine.default_device()
        metafunc.parametrize("case", metafunc.module.CASES[device.type], ids=str)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info.update(machine.describe(machine.default_device()), **machine.provenance())


class _Replay:
    """A clock for pytest-benchmark that tells the times our timer took."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def load(self, samples: list[float]) -> None:
        self.ticks = [tick for spent in reversed(samples) for tick in (spent, 0.0)]

    def __call__(self) -> float:
        return self.ticks.pop()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    replay = _Replay()
    request.node.add_marker(pytest.mark.benchmark(timer=replay, warmup=False))
    benchmark = request.getfixturevalue("benchmark")

    def measured(case: Case) -> None:
        row = measure(request.module, case, machine.default_device())
        assert row.match, row.error
        benchmark.extra_info.update(row.to_dict())
        samples = row.samples_s[OURS]
        replay.load(samples)
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)

    return measured
