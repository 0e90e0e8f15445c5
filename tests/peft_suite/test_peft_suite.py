"""PEFT's own tests of LoRA, as they are and with pyfastft in place of its arithmetic."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest

HERE = Path(__file__).parent
OURS, IDLE, OVER, VARIANT = "ours", "idle:", "over ", "another method: "
SHARE = 0.9
SELECTED = "LoRA and MLP and (merge or adapter or save or unload or forward or disable)"
SETTINGS = """\
[pytest]
addopts =
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
"""
# What the suite's files import, used here or not.
NEEDED = ("attr", "datasets", "diffusers")


def suite(cache: Path) -> Path:
    """The tests of the installed PEFT, from its source distribution."""
    folder = cache / f"peft-{peft.__version__}"
    if (folder / "pytest.ini").is_file():
        return folder
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(cache)]
    command += ["--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    got = subprocess.run(
        [*command, f"peft=={peft.__version__}"], capture_output=True, text=True, timeout=300
    )
    archive = cache / f"peft-{peft.__version__}.tar.gz"
    if got.returncode or not archive.is_file():
        pytest.skip(f"PEFT's source distribution cannot be downloaded: {got.stderr[-300:]}")
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as file:
        wanted = [m for m in file.getmembers() if m.name.startswith(f"{folder.name}/tests/")]
        file.extractall(cache, members=wanted, filter="data")
    (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text(SETTINGS)  # Last: it says that the folder is whole.
    return folder


def start(folder: Path, results: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-q", "-p", "no:cacheprovider"]
    command += ["--junitxml", str(results), "-k", SELECTED, *options, "tests/test_custom_models.py"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcomes(results: Path) -> dict[str, str]:
    cases = ElementTree.parse(results).iter("testcase")
    bad = ("failure", "error", "skipped")
    return {
        f"{case.get('classname')}::{case.get('name')}": next(
            (child.tag for child in case if child.tag in bad), "passed"
        )
        for case in cases
    }


@pytest.mark.more
def test_pefts_own_suite(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        pytest.skip(f"PEFT's tests import {', '.join(missing)}, see the extra 'peft-suite'")
    folder = suite(request.config.cache.mkdir("peft_suite"))
    files = {name: tmp_path / f"{name}.xml" for name in ("alone", "with")}
    counted = tmp_path / "counts.json"
    runs = [
        start(folder, files["alone"]),
        start(folder, files["with"], "-p", "plugin", "--lora-counts", str(counted)),
    ]
    try:
        logs = [run.communicate(timeout=1500)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(path.is_file() for path in (*files.values(), counted)), "\n".join(logs)[-3000:]
    alone, ours = outcomes(files["alone"]), outcomes(files["with"])
    passed = {name for name, outcome in alone.items() if outcome == "passed"}
    lost = sorted(name for name in passed if ours.get(name) != "passed")

    counts = Counter(json.loads(counted.read_text()))
    # Where no adapter computes, where another method does, or over another layer, there is no
    # LoRA forward over nn.Linear to take over.
    other = {kind: n for kind, n in counts.items() if kind.startswith((IDLE, OVER, VARIANT))}
    asked = counts.total() - sum(other.values())
    with capsys.disabled():
        print(f"\nPEFT {peft.__version__}: {len(passed)} tests pass alone, {len(lost)} lost")
        print(f"LoRA forwards over nn.Linear: {counts[OURS]} of {asked} by pyfastft")
        for kind, number in counts.most_common():
            print(f"  {number:6d}  {kind}")
    # Read by `pyfastft bench --bars --slow`.
    record_property("passed", len(passed))
    record_property("lost", len(lost))
    record_property("percent_ours", 100 * counts[OURS] / max(asked, 1))
    assert len(passed) > 1000, logs[0][-3000:]
    assert not lost, f"{lost[:5]}\n{logs[1][-3000:]}"
    assert counts[OURS] > 0
    assert counts[OURS] >= SHARE * asked
