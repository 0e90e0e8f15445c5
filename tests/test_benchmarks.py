"""The benchmarks' machinery. No speed is asserted here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pyfastft._cli import UsageError
from pyfastft._op import REGISTRY, Impl
from pyfastft.benchmarks import bars, bench_lora, cli, figures, machine, measure, probe, report
from pyfastft.benchmarks.lora import layer
from pyfastft.benchmarks.measure import Case, Row
from pyfastft.benchmarks.timer import (
    Candidate,
    WallClock,
    interleave,
    quiet_rounds,
    ratio_of_medians,
    summarise,
)

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = Case((5, 24, 16), 3, 0.1, "float32")


class FakeClock:
    """Time passes only where a candidate says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def start(self) -> float:
        return self.now

    def stop(self, started: float) -> float:
        return self.now - started

    def seconds(self, spans: Sequence[float]) -> list[float]:
        return list(spans)


class Work:
    """A step that takes its time on a fake clock and writes down its turn."""

    def __init__(self, clock: FakeClock, turns: list[str], name: str, seconds: float) -> None:
        self.clock, self.turns, self.name, self.seconds = clock, turns, name, seconds

    def __call__(self) -> None:
        self.turns.append(self.name)
        self.clock.now += self.seconds


def test_candidates_take_turns() -> None:
    clock, turns = FakeClock(), []
    steps = {"a": 1.0, "b": 2.0, "c": 4.0}
    times = interleave(
        {name: Candidate([Work(clock, turns, name, s)]) for name, s in steps.items()},
        clock=clock,
        budget_s=70.0,
    )
    assert times == {name: [s] * 10 for name, s in steps.items()}
    assert turns[-30:] == ["a", "b", "c"] * 10


def test_short_calls_fill_a_sample_and_count_per_call() -> None:
    clock, turns = FakeClock(), []
    candidates = {"a": Candidate([Work(clock, turns, "a", 1.0)])}
    times = interleave(candidates, clock=clock, budget_s=0, min_sample_s=50, min_rounds=3)
    assert times == {"a": [1.0] * 3}
    assert turns[-150:] == ["a"] * 150


def test_steps_rotate_and_before_is_not_timed() -> None:
    clock, turns = FakeClock(), []
    steps = [Work(clock, turns, name, 1.0) for name in "xyz"]

    def before() -> None:
        turns.append("before")
        clock.now += 100.0

    times = interleave(
        {"a": Candidate(steps, before)}, clock=clock, budget_s=0, min_sample_s=1, min_rounds=3
    )
    assert times == {"a": [1.0] * 3}
    calls = [turn for turn in turns if turn != "before"]
    assert calls == ["xyz"[index % 3] for index in range(len(calls))]
    assert turns[-6::2] == ["before"] * 3


def test_wall_clock_measures_time() -> None:
    times = interleave({"a": Candidate([lambda: sum(range(1000))])}, clock=WallClock(), budget_s=0)
    assert len(times["a"]) >= 3
    assert all(spent > 0 for spent in times["a"])


def test_statistics() -> None:
    assert summarise([1, 2, 3, 4, 5]).median == 3
    assert summarise([1, 2, 3, 4, 5]).iqr == 2
    exact = ratio_of_medians([3.0] * 9, [2.0] * 9)
    assert (exact.value, exact.low, exact.high) == (1.5, 1.5, 1.5)
    spread = ratio_of_medians([2, 3, 4, 3, 3, 3, 9], [1, 1, 1, 1, 1, 1, 1])
    assert spread.value == 3
    assert spread.low <= 3 <= spread.high
    assert spread.low < spread.high
    # Paired by rounds: a disturbance that hits both cancels.
    moody = [1.0, 5.0, 1.0, 7.0, 1.0, 1.0]
    paired = ratio_of_medians([2 * mood for mood in moody], moody)
    assert (paired.low, paired.high) == (2, 2)


def test_a_disturbed_round_is_found_by_the_probe() -> None:
    assert quiet_rounds([1.0, 1.05, 2.0, 1.0, 1.3]) == [0, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiler", [True, False])
def test_probes_count_their_work(
    dtype: torch.dtype, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiler:
        monkeypatch.setattr(probe, "library", lambda: None)
    for one in (probe.arithmetic(dtype, CPU), probe.reading(1 << 20, CPU)):
        assert one.work > 0
        one.candidate.steps[0]()
        assert ("torch" in one.how) == (not compiler or probe.library() is None)


def test_costs_are_those_of_the_matrix_products() -> None:
    m, k, n, r = 7, 5, 3, 2
    flops, size = bench_lora._cost(Case((m, k, n), r, 0.0, "float32"))
    forward = 2 * m * k * n + 2 * m * k * r + 2 * m * r * n
    # T = dY B, dX = dY W + T A, dA = T^T x, dB = dY^T S
    backward = 2 * m * n * r + 2 * m * n * k + 2 * m * r * k + 2 * m * r * k + 2 * m * n * r
    assert flops == forward + backward
    inputs, outputs = m * k + n * k + r * k + n * r, m * n + m * r
    again, gradients = m * n + m * r + inputs, m * k + r * k + n * r
    assert size == 4 * (inputs + outputs + again + gradients)


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """lora_linear on the CPU gets one gradient slightly wrong."""
    op = REGISTRY["lora_linear_backward"]
    op.impl("cpu")  # imports the backend, which would otherwise register itself later
    reference = op.impl("reference")
    assert isinstance(reference, Impl)

    def launch(*args: Any) -> None:
        reference.launch(*args)
        args[3].mul_(1.001)

    monkeypatch.setitem(op.impls, "cpu", Impl(launch, lambda *args: None))


@pytest.mark.usefixtures("wrong_kernel")
def test_the_gate_refuses_a_wrong_kernel() -> None:
    row = measure.measure(bench_lora, TINY, CPU, peers=["pytorch"], budget_s=0)
    assert not row.match
    assert "pyfastft: dB: error" in str(row.error)
    assert not row.median_ms
    assert not row.speedup
    assert "not recorded" in report.text_table(report.speed_cells([row]))


@pytest.mark.usefixtures("wrong_kernel")
def test_a_wrong_kernel_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--quick", "--shape", "5,24,16", "--rank", "3") == 1
    assert "not accurate, nothing recorded" in capsys.readouterr().out


def test_the_gate_refuses_a_peer_that_computes_something_else() -> None:
    operands = layer.Operands.draw(TINY, CPU)
    other = layer.Operands.draw(TINY, CPU)
    other.x, other.lora_a, other.lora_b = operands.trained
    with pytest.raises(AssertionError, match="peft: y: error"):
        layer.gate(operands, TINY.p, layer.peft_layer(other, TINY.p))


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(arguments)


def run(*arguments: str) -> int:
    return cli.run(parse(*arguments, "--device", "cpu"))


def test_quick_run_on_a_shape_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_QUICK_BUDGET_S", 0.2)
    own = ["--shape", "5,24,16", "--rank", "3", "--p", "0.25", "--dtype", "float32"]
    assert run("--quick", *own, "--output", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "5, 24, 16" in printed
    assert "over pytorch" in printed
    (path,) = tmp_path.glob("*/lora.json")
    assert path.parent.name == machine.slug(CPU)
    record = json.loads(path.read_text())
    (row,) = (Row.from_dict(row) for row in record["rows"])
    assert row.match
    assert row.case == Case((5, 24, 16), 3, 0.25, "float32")
    assert row.backend in ("cpu", "reference")
    assert row.median_ms["pyfastft"] > 0
    assert row.gflops["pyfastft"] == pytest.approx(
        row.flops / row.median_ms["pyfastft"] / 1e6, rel=0.01
    )
    assert row.speedup["pytorch"][1] <= row.speedup["pytorch"][0] <= row.speedup["pytorch"][2]
    assert row.roofline["percent"]["pyfastft"] > 0
    assert "torch.compile" not in row.median_ms
    assert record["provenance"]["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(row.to_dict())) == record["rows"][0]


def test_an_absent_peer_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(cli, "_QUICK_BUDGET_S", 0.0)
    assert run("--quick", "--shape", "5,24,16", "--dtype", "bfloat16", "--rank", "3") == 0
    printed = capsys.readouterr().out
    assert "left out: peft: cannot be used" in printed
    assert "over peft" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank: expected at least 1, got 0"),
        (["--p", "1.5"], "--p: expected a probability, got 1.5"),
        (["--update", "--quick"], "--update measures everything"),
        (["--update", "--json"], "prints none"),
        (["--family", "house"], "has bars only"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(*arguments)


@pytest.mark.parametrize("shape", ["5,24", "a,b,c", "5,0,16"])
def test_wrong_shape(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--shape", shape)
    assert ended.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_cases_can_be_narrowed_and_changed() -> None:
    every = cli.cases(bench_lora, parse(), CPU)
    assert every == list(bench_lora.CASES["cpu"])
    changed = cli.cases(bench_lora, parse("--dtype", "bfloat16", "--rank", "4", "--p", "0"), CPU)
    assert [case.shape for case in changed] == [c.shape for c in every if c.dtype == "bfloat16"]
    assert {(case.rank, case.p, case.dtype) for case in changed} == {(4, 0.0, "bfloat16")}


BAR = """
[[bar]]
id = "{id}"
bar = "a bar"
target = "at least 2x"
family = "house"
figure = "figure"
key = "ours"
unit = "x"
statistic = "one run"
value = 2.0
direction = "at least"
"""


ONE_BAR = bars.load(BAR.format(id="one"))[0]


def one_bar(**fields: Any) -> bars.Bar:
    return dataclasses.replace(ONE_BAR, **fields)


def test_bars_are_well_formed() -> None:
    loaded = bars.load()
    assert len({bar.bar for bar in loaded}) >= 8
    for bar in loaded:
        if bar.family == bars.HOUSE:
            assert bar.figure in figures.FIGURES
        else:
            assert bar.figure in ("speedup", *measure.family(bar.family).FIGURES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BAR.format(id="one") + BAR.format(id="one"), "repeated id one"),
        (BAR.format(id="one") + "colour = 1\n", "one: .*colour"),
        (BAR.format(id="one").replace('unit = "x"\n', ""), "one: .*unit"),
        (BAR.format(id="one").replace("at least", "about"), "expected direction at least or"),
        (BAR.format(id="one").replace("value = 2.0\n", ""), "value and direction come together"),
        (BAR.format(id="one") + "rank = 2\n", "shape, rank, p and dtype come together"),
    ],
)
def test_malformed_bars_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bars.load(text)


@pytest.mark.parametrize(
    ("fields", "numbers", "verdict", "code"),
    [
        ({}, {"ours": 2.0}, "met", 0),
        ({}, {"ours": 1.9}, "falls short", 1),
        ({"direction": "at most"}, {"ours": 1.9, "theirs": 3.0}, "met", 0),
        ({"direction": "at most"}, {"ours": 2.1}, "falls short", 1),
        ({"value": None, "direction": None}, {"ours": 0.1}, "reported", 0),
        ({"machine": "another-machine"}, {"ours": 0.1}, "not measured", 0),
        ({"machine": "cuda"}, {"ours": 0.1}, "not measured", 0),
        ({"slow": True}, {"ours": 0.1}, "not measured", 0),
        ({}, {"theirs": 0.1}, "not measured", 0),
        ({}, {"ours": "the peer is not installed"}, "not measured", 0),
        ({}, RuntimeError("broken"), "falls short", 1),
    ],
)
def test_bars_and_their_exit_code(
    fields: dict[str, Any],
    numbers: dict[str, float | str] | Exception,
    verdict: str,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def figure(*_: Any) -> dict[str, float | str]:
        if isinstance(numbers, Exception):
            raise numbers
        return numbers

    monkeypatch.setitem(figures.FIGURES, "figure", figure)
    monkeypatch.setattr(bars, "load", lambda: [one_bar(**fields)])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert run("--bars", "--family", "house") == code
    printed = capsys.readouterr().out
    assert verdict in printed
    assert ("falls short: one: the bar is: at least 2x" in printed) == (code == 1)
    assert run("--bars", "--family", "house", "--json") == code
    (found,) = json.loads(capsys.readouterr().out)
    assert found["verdict"] == verdict
    if isinstance(numbers, dict) and isinstance(numbers.get("ours"), str):
        assert found["why"] == numbers["ours"]


@pytest.mark.parametrize(("measured", "code"), [(3.0, 0), (1.0, 1)])
@pytest.mark.parametrize("own", [True, False])
def test_slow_bars_are_read_with_their_revision(
    measured: float,
    code: int,
    own: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def figure(*_: Any) -> dict[str, float]:
        raise AssertionError("measured, though it is slow")

    monkeypatch.setitem(figures.FIGURES, "figure", figure)
    monkeypatch.setattr(bars, "load", lambda: [one_bar(slow=True)])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    folder = tmp_path / (machine.slug(CPU) if own else "another-machine")
    record = {"numbers": {"ours": measured}, "git_sha": "c0ffee", "dirty": False}
    report.write_json(folder / "bars.json", {"figures": {"one": record}})
    assert run("--bars") == code
    assert f"c0ffee on {folder.name}" in capsys.readouterr().out
    assert run("--bars", "--slow") == 1
    assert "measured, though it is slow" in capsys.readouterr().out


def test_the_speed_bar_comes_from_the_gated_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "measure", lambda *_, **__: Row("lora_linear", TINY, "cpu", False))
    bar = next(bar for bar in bars.load() if bar.figure == "speedup" and bar.value)
    finding = bars.judge(bar, bars.Session(CPU).record(bar))
    assert finding.verdict == "falls short"
    known = {(bar.family, "speedup", bar.case): {"peft": 1.3, "pytorch": 1.1}}
    finding = bars.judge(bar, bars.Session(CPU, known).record(bar))
    assert finding.verdict == "met"
    assert "1.3 x (pytorch 1.1)" in report.text_table(bars.cells([finding]))


def test_saved_bytes_count_storages_once_and_no_parameters() -> None:
    case = Case((8, 16, 32), 4, 0.1, "bfloat16")
    saved = bench_lora.saved_for_backward(case, CPU)
    assert saved["pyfastft"] == 2 * 8 * 16 + 2 * 8 * 4 + 16


def test_readme_figures_are_those_of_the_results() -> None:
    """So no figure can be typed by hand."""
    assert report.main(["--check"]) == 0


def test_readme_blocks_are_filled_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- begin: lora -->\n1000x\n<!-- end: lora -->\nafter\n")
    assert report.main(["--readme", str(readme), "--check"]) == 1
    assert "1000x" in readme.read_text()
    assert report.main(["--readme", str(readme)]) == 0
    assert "1000x" not in readme.read_text()
    assert readme.read_text().startswith("before\n<!-- begin: lora -->\n")
    assert readme.read_text().endswith("<!-- end: lora -->\nafter\n")
    assert report.main(["--readme", str(readme), "--check"]) == 0
    for wrong, why in (
        ("<!-- begin: lora -->\n", "has no"),
        ("<!-- begin: nothing -->\n<!-- end: nothing -->\n", "expected a block of"),
    ):
        readme.write_text(wrong)
        assert report.main(["--readme", str(readme)]) == 2
        assert why in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository in the place of this one."""
    root = tmp_path / "checkout"
    root.mkdir()
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    monkeypatch.setattr(figures, "CHECKOUT", root)
    return root


def test_update_writes_results_bars_and_readme(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = checkout / "benchmarks" / "results"
    speed = one_bar(id="speed", family="lora", figure="speedup", key="pytorch", value=1e-9)
    speed = dataclasses.replace(speed, shape=TINY.shape, rank=TINY.rank, p=TINY.p, dtype=TINY.dtype)
    loaded = [speed, one_bar(slow=True), one_bar(id="other", machine="cuda")]
    monkeypatch.setattr(machine, "CHECKOUT", checkout)
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(bars, "load", lambda: loaded)
    monkeypatch.setattr(cli, "cases", lambda *_: [TINY])
    monkeypatch.setattr(cli, "PEERS", ("pytorch",))
    monkeypatch.setattr(cli, "_BUDGET_S", 0.0)
    monkeypatch.setitem(figures.FIGURES, "figure", lambda *_: {"ours": 7.0})
    names = ("headline", "lora", "bars")
    marked = "".join(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in names)
    (checkout / "README.md").write_text(marked)

    assert run("--update") == 0
    own = results / machine.slug(CPU)
    assert set(json.loads((own / "bars.json").read_text())["figures"]) == {"speed"}
    first = json.loads((own / "lora.json").read_text())
    measured = first["rows"][0]["speedup"]["pytorch"][0]
    kept = json.loads((own / "bars.json").read_text())["figures"]["speed"]["numbers"]
    assert kept == {"pytorch": measured}, "the bar's figure is not the table's"
    text = (checkout / "README.md").read_text()
    assert "| 5, 24, 16 | 3 | 0.1 | float32 |" in text
    assert "| speed (M=5 K=24 N=16 R=3 p=0.1 float32) | at least 1e-09 x |" in text
    assert "| one |" not in text

    assert run("--update", "--slow") == 0
    assert set(json.loads((own / "bars.json").read_text())["figures"]) == {"speed", "one"}
    assert "| one | at least 2 x | 7 x |" in (checkout / "README.md").read_text()
    monkeypatch.setitem(figures.FIGURES, "figure", lambda *_: {"ours": 1.0})
    assert run("--update", "--slow") == 1
    assert "falls short: one" in capsys.readouterr().out


def test_committed_results_can_be_read_back() -> None:
    for path in report.RESULTS.glob("*/*.json"):
        record = json.loads(path.read_text())
        if path.name == "bars.json":
            assert set(record["figures"]) <= {bar.id for bar in bars.load()}
            continue
        for row in map(Row.from_dict, record["rows"]):
            assert row.match, f"{path}: a figure without a passed gate"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Xeon(R) Platinum 8480+ 4 cores", "intel-r-xeon-r-platinum-8480-4-cores"),
    ],
)
def test_machine_names(text: str, name: str) -> None:
    assert machine._slug(text) == name


@pytest.mark.more
def test_pytest_benchmark_files_use_the_same_timer(tmp_path: Path) -> None:
    stored = tmp_path / "stored.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["benchmarks", f"--benchmark-json={stored}", "-k", "384 and float32"]
    # A worker of pytest-xdist hands its variables on, and there pytest-benchmark stays idle.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=own, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = json.loads(stored.read_text())["benchmarks"]
    row = one["extra_info"]
    assert row["match"]
    assert one["stats"]["rounds"] == row["rounds"]
    assert one["stats"]["median"] * 1e3 == pytest.approx(row["median_ms"]["pyfastft"], rel=0.001)


def commit(root: Path, **files: str) -> None:
    for name, text in files.items():
        (root / name).write_text(text)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(root), "add", "--all"], check=True)
    subprocess.run(
        ["git", "-C", str(root), *identity, "commit", "--quiet", "-m", "files"], check=True
    )


DEMO = """demo:
\tmkdir pyfastft-demo
\techo '{"lora against full fine-tuning, points": -0.5}' > pyfastft-demo/results.json
\ttouch pyfastft-demo/results.md pyfastft-demo/plot.png
"""


def test_a_fresh_clone_is_what_is_committed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYFASTFT_BACKEND", "reference")
    commit(checkout, Makefile=DEMO + '\ttest -z "$$PYFASTFT_BACKEND$$VIRTUAL_ENV"\n')
    (checkout / "Makefile").write_text("demo:\n\tfalse\n")
    found = figures.fresh_clone_demo()
    assert found["points over full"] == -0.5
    assert 0 < found["minutes"] < 1


@pytest.mark.parametrize(
    ("makefile", "why"),
    [
        (DEMO + "\trm pyfastft-demo/plot.png\n", "make demo wrote no plot.png"),
        (DEMO + "\techo broken; exit 3\n", "make demo ended with 2\n.*broken"),
    ],
)
def test_a_demo_that_fails_gives_no_figure(checkout: Path, makefile: str, why: str) -> None:
    commit(checkout, Makefile=makefile)
    with pytest.raises(AssertionError, match=f"(?s){why}"):
        figures.fresh_clone_demo()


def test_figures_of_test_suites(checkout: Path) -> None:
    suite = checkout / "tests" / "test_registry.py"
    suite.parent.mkdir()
    suite.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', range(5))\n"
        "def test_rejects(n):\n"
        "    assert n != 2\n"
        "def test_other():\n"
        "    assert False\n"
    )
    assert figures.rejects() == {"wrong": 1, "cases": 5}
    with pytest.raises(AssertionError, match="tests/peft_suite"):
        figures.peft_suite()


def test_import_time_is_what_is_added_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_IMPORTS", 1)
    found = figures.import_time()
    assert set(found) == {"seconds", "torch alone", "lines printed"}
    assert found["seconds"] > 0
    assert found["lines printed"] == 0
