"""Figures that belong to no family: importing, and what a fresh clone and the test suites do."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pyfastft.benchmarks.machine import CHECKOUT

_IMPORTS = 7
_IMPORT = """
import time
started = time.perf_counter()
import torch
between = time.perf_counter()
import pyfastft
print(time.perf_counter() - between, between - started)
"""
_LONGEST_S = 3600


def import_time(*_: Any) -> dict[str, float]:
    """Seconds that importing pyfastft adds to importing torch; lines it prints."""
    added, torch_alone, printed = [], [], 0
    for _run in range(_IMPORTS + 1):
        done = _call([sys.executable, "-c", _IMPORT])
        lines = (done.stdout + done.stderr).splitlines()
        printed = max(printed, len(lines) - 1)
        ours, torchs = map(float, done.stdout.splitlines()[-1].split())
        added.append(ours)
        torch_alone.append(torchs)
    # The first may have read from the disk.
    return {
        "seconds": statistics.median(added[1:]),
        "torch alone": statistics.median(torch_alone[1:]),
        "lines printed": float(printed),
    }


def rejects(*_: Any) -> dict[str, float]:
    """Reject cases of every op that do not fail as they must, of how many."""
    counts, _properties = _pytest("tests/test_registry.py", "-k", "test_rejects")
    return {"wrong": counts["failures"] + counts["errors"], "cases": counts["tests"]}


def peft_suite(*_: Any) -> dict[str, float]:
    """PEFT's own tests through the plugin: tests lost, and the percentage of forwards ours."""
    _counts, properties = _pytest("tests/peft_suite", "-m", "more")
    return {name: float(properties[name]) for name in ("lost", "passed", "percent_ours")}


def fresh_clone_demo(*_: Any) -> dict[str, float]:
    """Minutes of ``make demo`` in a fresh clone; accuracy of LoRA beyond that of full fine-tuning.

    The accuracy is in points, positive where LoRA is better.
    """

    def results(clone: Path) -> dict[str, float]:
        output = clone / "pyfastft-demo"
        for written in ("results.md", "plot.png"):
            if not (output / written).is_file():
                raise AssertionError(f"make demo wrote no {written}")
        document = json.loads((output / "results.json").read_text())
        return {"points over full": document["lora against full fine-tuning, points"]}

    return _in_fresh_clone("demo", results)


def fresh_clone_test(*_: Any) -> dict[str, float]:
    """Minutes of ``make test`` in a fresh clone."""
    return _in_fresh_clone("test", lambda clone: {})


FIGURES = {
    "import_time": import_time,
    "rejects": rejects,
    "peft_suite": peft_suite,
    "fresh_clone_demo": fresh_clone_demo,
    "fresh_clone_test": fresh_clone_test,
}


def _in_fresh_clone(target: str, results: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    _expect_checkout()
    # Nothing of this environment may help: no virtual environment, no settings of ours.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "VIRTUAL_ENV" and not name.startswith(("PYFASTFT_", "PYTHON"))
    }
    with tempfile.TemporaryDirectory(prefix="pyfastft-clone-") as folder:
        clone = Path(folder) / "pyfastft"
        _call(["git", "clone", "--quiet", str(CHECKOUT), str(clone)])
        started = time.perf_counter()
        _call(["make", target], cwd=clone, env=environment)
        minutes = (time.perf_counter() - started) / 60
        return {"minutes": minutes, **results(clone)}


def _pytest(*selection: str) -> tuple[dict[str, float], dict[str, str]]:
    """Run some tests; their counts, and the properties that they recorded."""
    _expect_checkout()
    with tempfile.TemporaryDirectory(prefix="pyfastft-bars-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *selection, f"--junitxml={report}"]
        # A failing test is a figure, not an error; no report, or no test, is one.
        done = _call(command, cwd=CHECKOUT, fine=(0, 1))
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {
        name: float(sum(int(suite.get(name, 0)) for suite in suites))
        for name in ("tests", "failures", "errors", "skipped")
    }
    if counts["tests"] == counts["skipped"]:
        raise AssertionError(f"{selection[0]}: nothing ran\n{_tail(done.stdout)}")
    properties = {
        item.get("name", ""): item.get("value", "")
        for suite in suites
        for item in suite.iter("property")
    }
    return counts, properties


def _call(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    fine: Sequence[int] = (0,),
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=_LONGEST_S
    )
    if done.returncode not in fine:
        shown = " ".join(command[:3])
        raise AssertionError(
            f"{shown} ended with {done.returncode}\n{_tail(done.stdout + done.stderr)}"
        )
    return done


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-15:])


def _expect_checkout() -> None:
    if not (CHECKOUT / ".git").exists():
        raise AssertionError("measured in a git checkout only")
