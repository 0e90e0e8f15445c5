"""The command line: help, exit codes, diagnostics, and the table of environment variables."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyfastft
from pyfastft import _doctor
from pyfastft.__main__ import main
from pyfastft._env import VARIABLES
from pyfastft._op import BACKENDS, REGISTRY, Impl
from pyfastft.testing.samples import samples

ROOT = Path(__file__).parents[1]


def exit_code(*argv: str) -> int:
    """The code that the command line exits with, whether it returns or argparse exits."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_help_names_every_command_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: pyfastft [-h] [--version] COMMAND ...")
    assert pyfastft.__doc__ in text
    for command in ("doctor", "demo", "bench"):
        assert re.search(rf"^    {command} +\w", text, re.MULTILINE), command
    assert "examples:" in text
    assert "pyfastft demo --model DIR --data F" in text


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("doctor", ["--json", "--no-selftest"]),
        ("demo", ["--model", "--data", "--output", "--seed", "--quick", "--device", "--json"]),
        ("bench", ["--family", "--bars"]),
    ],
)
def test_help_of_a_command(
    command: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(command, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: pyfastft {command}")
    for option in options:
        assert option in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"pyfastft {pyfastft.__version__}\n"


@pytest.mark.parametrize("argv", [["nonsense"], ["doctor", "--nonsense"], ["demo", "--seed", "x"]])
def test_a_wrong_call_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*argv) == 2
    assert "error:" in capsys.readouterr().err


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("doctor", "--json", "--no-selftest") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "pyfastft",
        "versions",
        "machine",
        "extensions",
        "environment",
        "matrix",
        "selftest",
        "ok",
    }
    assert found["versions"]["torch"] == torch.__version__
    assert {(c["op"], c["backend"]) for c in found["matrix"]} == {
        (op, backend) for op in REGISTRY for backend in BACKENDS
    }
    for cell in found["matrix"]:
        assert all(why is None or why for why in cell["reasons"].values()), cell
        if cell["backend"] == "reference":
            assert cell["runs"]
        if cell["backend"] == "cuda" and not torch.cuda.is_available():
            assert not cell["runs"]
            assert "_cuda" in cell["reasons"]["fp32"] or "CUDA" in cell["reasons"]["fp32"]
    assert [v["name"] for v in found["environment"]] == [v.name for v in VARIABLES]


@pytest.fixture
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "BACKENDS", ("reference",))


@pytest.mark.usefixtures("only_reference")
def test_doctor_tests_every_op(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # All samples are test_registry's matter.
    monkeypatch.setattr(_doctor, "samples", lambda op: itertools.islice(samples(op), 1))
    assert exit_code() == 0
    text = capsys.readouterr().out
    for op in REGISTRY:
        assert re.search(rf"^  {op} +yes", text, re.MULTILINE)
        assert re.search(rf"^  {op} +reference +cpu +\d+ +\S+e[-+]\d+ .* ok$", text, re.MULTILINE)
    for variable in VARIABLES:
        assert variable.name in text


@pytest.mark.usefixtures("only_reference")
def test_doctor_catches_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    op = REGISTRY["lora_linear"]
    right = op.impl("cpu")
    if isinstance(right, str):
        pytest.skip(right)

    def wrong(y: torch.Tensor, *rest: object) -> None:
        right.launch(y, *rest)
        if y.numel() > 1:
            y.view(-1)[-1] += y.abs().max()

    monkeypatch.setattr(_doctor, "BACKENDS", ("cpu",))
    monkeypatch.setattr(_doctor, "REGISTRY", {"lora_linear": op})
    monkeypatch.setitem(op.impls, "cpu", Impl(wrong, right.unsupported))
    assert exit_code("doctor") == 1
    text = capsys.readouterr().out
    assert "FAILED: odd, fp32: AssertionError: output 0" in text
    assert "The self-test FAILED" in text


def test_a_wrong_variable_is_said_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyfastft", "doctor", "--no-selftest"],
        env={"PYFASTFT_CPU_ISA": "avx9000", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pyfastft: error: PYFASTFT_CPU_ISA: expected one of scalar")
    assert "Traceback" not in done.stderr


# Python's and C++'s ways to read the environment; a test of the test is below.
_READ = re.compile(
    r"(?:environ(?:\.get|\.setdefault|\.pop)?\s*[\[(]|getenv\s*\()\s*[\"'](\w+)[\"']", re.MULTILINE
)


def sources() -> list[Path]:
    folders = ("pyfastft", "triton_kernels", "benchmarks", "csrc")
    suffixes = {".py", ".cpp", ".h", ".hpp", ".cu", ".cuh"}
    found = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes]
    return [*found, ROOT / "setup.py"]


def test_reads_of_the_environment_are_recognised() -> None:
    text = """os.environ["A"] os.environ.get('B') os.getenv("C") environ.setdefault(\n  "D", "1")
    std::getenv("E")"""
    assert _READ.findall(text) == list("ABCDE")


def test_every_variable_read_is_in_the_table() -> None:
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the sources are not beside the tests")
    read = {name for path in sources() for name in _READ.findall(path.read_text("utf-8"))}
    listed = {variable.name for variable in VARIABLES if variable.read != "tests"}
    assert read == listed


def test_the_table_says_what_is_in_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = next(v for v in VARIABLES if v.name == "PYFASTFT_STRICT")
    monkeypatch.delenv("PYFASTFT_STRICT", raising=False)
    assert variable.effective == "0"
    monkeypatch.setenv("PYFASTFT_STRICT", "1")
    assert variable.effective == "1"
