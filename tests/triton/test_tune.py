"""The tool that writes the table of engines: on tiny layers, and a clock of its own. No speed is
asserted here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pyfastft import backend
from pyfastft.benchmarks import tune
from pyfastft.triton_kernels import _engine, _int4_engine
from pyfastft.triton_kernels._common import INTERPRETED
from pyfastft.triton_kernels._engine import Problem
from pyfastft.triton_kernels.lora import _fused, _stages
from pyfastft.triton_kernels.ptq4 import _gradient, _kernels

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
FORWARD = Problem("forward", 3, 16, 32, 2, "bfloat16", "bfloat16", dropout=True, aligned=True)
PROBLEMS = (FORWARD, replace(FORWARD, dropout=False), replace(FORWARD, direction="backward"))

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"
)


class FakeClock:
    """Time passes only where a kernel says so."""

    now = 0.0

    def start(self) -> float:
        return self.now

    def stop(self, started: float) -> float:
        return self.now - started

    def seconds(self, spans: Sequence[float]) -> list[float]:
        return list(spans)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeClock]:
    """A clock on which the stage after torch's GEMM, a fused product and decode take so long."""

    def build(gemm: float, fused: float, decode: float = 100.0) -> FakeClock:
        fake = FakeClock()

        def costs(owner: Any, name: str, seconds: float) -> None:
            call = getattr(owner, name)

            def timed(*args: Any, **kwargs: Any) -> Any:
                fake.now += seconds
                return call(*args, **kwargs)

            monkeypatch.setattr(owner, name, timed)

        for name in ("up", "dx"):
            costs(_stages.TritonStages, name, gemm)
        for name in ("base_up", "base_dx"):
            costs(_fused, name, fused)
        costs(_fused, "decode", decode)
        return fake

    return build


def run(clock: FakeClock, output: Path, problems: Sequence[Problem] = PROBLEMS) -> list[str]:
    with backend("triton"):
        return tune.run(problems, DEVICE, clock=clock, budget_s=0.0, output=output)


def rows(output: Path) -> list[dict[str, Any]]:
    (measured,) = json.loads(output.read_text()).values()
    return measured["rows"]


def test_the_fastest_engine_is_written_and_then_chosen(
    clock: Callable[..., FakeClock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "table.json"
    assert run(clock(gemm=3.0, fused=2.0, decode=1.0), output) == []
    assert [row["engine"] for row in rows(output)] == ["fused", "decode", "fused"]
    assert rows(output)[0]["us"]["gemm"] == 3e6
    monkeypatch.setattr(_engine, "TABLE", output)
    _engine.forget()
    try:
        (device,) = _engine.table()
        for problem, row in zip(PROBLEMS, rows(output), strict=True):
            choice = _engine.plan(problem, device)
            assert (choice.engine, list(vars(choice.tiles).values())) == (
                row["engine"],
                row["tiles"],
            )
    finally:
        monkeypatch.undo()
        _engine.forget()


def test_a_tie_goes_to_torch(clock: Callable[..., FakeClock], tmp_path: Path) -> None:
    run(clock(gemm=1.0, fused=0.99), tmp_path / "table.json", [FORWARD])
    assert rows(tmp_path / "table.json")[0]["engine"] == "gemm"


def test_an_engine_that_is_not_accurate_takes_no_part(
    clock: Callable[..., FakeClock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = clock(gemm=3.0, fused=2.0)
    right = _fused.base_up

    def wrong(**operands: Any) -> None:
        right(**operands)
        operands["y"].add_(1.0)

    monkeypatch.setattr(_fused, "base_up", wrong)
    left_out = run(fake, tmp_path / "table.json", [FORWARD])
    (row,) = rows(tmp_path / "table.json")
    assert (row["engine"], set(row["us"])) == ("gemm", {"gemm"})
    assert len(left_out) == len(tune.contenders(FORWARD, (8, 0))) - 1
    assert all("not accurate" in line for line in left_out)


def test_an_interrupted_run_resumes_and_other_devices_stay(
    clock: Callable[..., FakeClock], tmp_path: Path
) -> None:
    output = tmp_path / "table.json"
    fake = clock(gemm=3.0, fused=2.0)
    run(fake, output, PROBLEMS[:1])
    table = json.loads(output.read_text())
    (first,) = table.values()
    first["rows"][0]["us"] = {"gemm": 12.0}
    output.write_text(json.dumps({**table, "another GPU": {"provenance": {}, "rows": []}}))
    run(fake, output, PROBLEMS[:2])
    after = json.loads(output.read_text())
    assert after.pop("another GPU") == {"provenance": {}, "rows": []}
    (measured,) = after.values()
    assert [row["us"]["gemm"] for row in measured["rows"]] == [12.0, 3e6]


@pytest.mark.parametrize(
    ("family", "engines"), [("lora", {"gemm", "fused"}), ("ptq4", {"panels", "product"})]
)
def test_every_problem_that_is_tuned_has_contenders(family: str, engines: set[str]) -> None:
    problems = tune.PROBLEMS[family, "cuda"]
    assert len(set(problems)) == len(problems)
    for problem in problems:
        found = tune.contenders(problem, (9, 0))
        assert {engine for engine, _ in found.values()} >= engines
        older = tune.contenders(problem, (8, 6))
        assert set(older) == {name for name in found if not name.endswith((" tma", " wide"))}


@pytest.mark.parametrize(
    "more", [{}, {"direction": "backward"}, {"direction": "backward", "adapter": "float32"}]
)
def test_4_bit_engines_are_measured_and_chosen(
    more: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of another backend take no part."""
    fake = FakeClock()

    def costs(module: ModuleType, name: str, seconds: float) -> None:
        call = getattr(module, name)

        def timed(*args: Any, **kwargs: Any) -> None:
            fake.now += seconds
            call(*args, **kwargs)

        monkeypatch.setattr(module, name, timed)

    costs(_kernels, "dequantize", 2.0)
    costs(_kernels, "product", 1.0)
    costs(_gradient, "input_gradient", 1.0)
    sizes = (3, 64, 64, 32, "bfloat16", "uint8")
    problem = _int4_engine.Problem(*sizes, table=False, aligned=True, **more)
    assert run(fake, tmp_path / "table.json", [problem]) == []
    (row,) = rows(tmp_path / "table.json")
    assert row["engine"] == "product"
    assert {name.split()[0] for name in row["us"]} == {"panels", "product"}
    monkeypatch.setattr(_int4_engine, "TABLE", tmp_path / "table.json")
    _int4_engine.forget()
    try:
        (device,) = _int4_engine.table()
        choice = _int4_engine.plan(problem, device, _int4_engine.ENGINES)
        assert list(vars(choice.tiles).values()) == row["tiles"]
    finally:
        monkeypatch.undo()
        _int4_engine.forget()


def test_without_a_gpu_the_command_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main(["--family", "lora", "--output", str(tmp_path / "table.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()
