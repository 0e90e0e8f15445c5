"""Which GEMM computes lora_linear's base product on a CPU: the core, unless the environment permits
torch's and a measurement says that it was the faster one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyfastft import _native
from pyfastft._op import REGISTRY, backend
from pyfastft.benchmarks import tune
from pyfastft.benchmarks.timer import WallClock
from pyfastft.native import _cpu_engine
from pyfastft.native._cpu_engine import Problem
from pyfastft.native._packing import pack
from pyfastft.testing.samples import upcast
from pyfastft.testing.tolerance import assert_accurate

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=_native.why_no_cpu() or "the library is there"
)

NEED = [True] * 7
MEASURED = Problem("forward", 8, 16, 32, "float32", threads=1)


@pytest.fixture
def permitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, threads: None) -> Iterator[Path]:
    """PYFASTFT_DETERMINISTIC=0, and a table in which torch's GEMM won at M=8 N=16 K=32."""
    torch.set_num_threads(1)
    row = {**vars(MEASURED), "engine": "gemm", "tiles": None}
    table = tmp_path / "table.json"
    table.write_text(json.dumps({_cpu_engine.cpu_name(): {"provenance": {}, "rows": [row]}}))
    monkeypatch.setattr(_cpu_engine, "TABLE", table)
    monkeypatch.setattr(_cpu_engine, "_permitted", True)
    _cpu_engine.forget()
    yield table
    _cpu_engine.forget()


def operands(m: int, n: int, k: int, dtype: torch.dtype, p: float = 0.25) -> tuple:
    """x, W, A, B, b, s, p, rng, gate; W and x with strides of their own."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    x, weight = draw(k, m).T, draw(k, n).T
    rng = torch.tensor([7, 9])
    return x, weight, draw(3, k), draw(n, 3), draw(n), torch.tensor(0.5), p, rng, draw(m, 3).abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 19, 33), (40, 64, 48), (1, 1, 1), (0, 4, 4), (4, 0, 4)])
def test_torch_as_the_base_gives_the_same_results(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    forward = (*operands(*shape, dtype), None, None)
    x, weight, a, b, _, scaling, p, rng, gate, *packed = forward
    grad = torch.randn(shape[0], shape[1]).to(dtype)
    with backend("reference"):
        xa = REGISTRY["lora_linear"](*forward)[1]
    backward = (grad, x, weight, a, b, xa, scaling, p, rng, gate, *packed, NEED)
    for name, args in (("lora_linear", forward), ("lora_linear_backward", backward)):
        with backend("cpu"), _cpu_engine.forced("gemm"):
            assert REGISTRY[name].explain(*args).engine == "gemm: gemm is forced"
            actual = REGISTRY[name](*args)
        with backend("reference"):
            truth, naive = REGISTRY[name](*upcast(args)), REGISTRY[name](*args)
        for i, (one, exact, usual) in enumerate(zip(actual, truth, naive, strict=True)):
            assert_accurate(one, exact, usual, gradient="backward" in name, what=f"{name} {i}")


def test_only_what_is_needed_is_written() -> None:
    x, weight, a, b, _, scaling, p, rng, gate = operands(4, 8, 8, torch.float32)
    grad, xa = torch.randn(4, 8), torch.randn(4, 3)
    need = [False, False, True, True, False, False, False]
    args = (grad, x, weight, a, b, xa, scaling, p, rng, gate, None, None, need)
    with backend("cpu"):
        expected = REGISTRY["lora_linear_backward"](*args)
        with _cpu_engine.forced("gemm"):
            actual = REGISTRY["lora_linear_backward"](*args)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_the_core_runs_unless_the_environment_permits_another(permitted: Path) -> None:
    x, weight = torch.randn(8, 32), torch.randn(16, 32)
    assert _cpu_engine.choose("forward", x, weight, None, None).engine == "gemm"
    _cpu_engine._permitted = False
    choice = _cpu_engine.choose("forward", x, weight, None, None)
    assert (choice.engine, "threads" in choice.why) == ("core", True)


@pytest.mark.parametrize(
    ("changes", "engine"),
    [
        ({}, "gemm"),
        ({"m": 16, "n": 8}, "gemm"),
        ({"m": 17}, "core"),
        ({"m": 0}, "core"),
        ({"direction": "backward"}, "core"),
        ({"dtype": "bfloat16"}, "core"),
        ({"threads": 2}, "core"),
    ],
)
def test_a_measurement_speaks_for_what_is_near(permitted, changes, engine) -> None:
    choice = _cpu_engine.plan(replace(MEASURED, **changes), _cpu_engine.cpu_name())
    assert choice.engine == engine
    assert _cpu_engine.plan(replace(MEASURED, **changes), "another CPU").engine == "core"


def test_a_packed_weight_is_the_cores(permitted: Path) -> None:
    x, weight = torch.randn(8, 32), torch.randn(16, 32)
    for plain in (weight, None):
        assert _cpu_engine.choose("forward", x, plain, pack(weight), None).engine == "core"
    assert _cpu_engine.choose("forward", x, None, None, None).engine == "core"


def test_the_environment_is_read() -> None:
    code = "from pyfastft.native import _cpu_engine as e; print(e._permitted)"
    for value, said in (("0", "True"), ("1", "False"), (None, "False")):
        environment = {k: v for k, v in os.environ.items() if k != "PYFASTFT_DETERMINISTIC"}
        if value is not None:
            environment["PYFASTFT_DETERMINISTIC"] = value
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == said


def test_tuning_writes_what_the_plan_reads(permitted: Path) -> None:
    permitted.unlink()
    problems = [MEASURED, replace(MEASURED, direction="backward", dtype="bfloat16")]
    left_out = tune.run(
        problems, torch.device("cpu"), clock=WallClock(), budget_s=0.0, output=permitted
    )
    assert left_out == []
    (measured,) = json.loads(permitted.read_text()).values()
    assert [set(row["us"]) for row in measured["rows"]] == [{"core", "gemm"}] * 2
    _cpu_engine.forget()
    for problem, row in zip(problems, measured["rows"], strict=True):
        choice = _cpu_engine.plan(problem, _cpu_engine.cpu_name())
        assert (choice.engine, "M=8" in choice.why) == (row["engine"], True)


def test_the_committed_table_is_of_problems_that_are_tuned() -> None:
    for measured in json.loads(_cpu_engine.TABLE.read_text()).values():
        for row in measured["rows"]:
            assert row["engine"] in _cpu_engine.ENGINES
            assert set(row["us"]) == set(_cpu_engine.ENGINES)
