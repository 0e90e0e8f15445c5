"""Everything the README shows is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyfastft as ft

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_python_blocks_run(block: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS[block]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_shell_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    targets = re.findall(r"^make (\S+)", blocks, flags=re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target


def test_named_files_and_functions_exist() -> None:
    folders = "pyfastft|csrc|triton_kernels|benchmarks|tests"
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`ft\.(\w+)\(", README):
        assert hasattr(ft, name), name


def test_environment_variables_are_listed() -> None:
    from pyfastft._env import VARIABLES

    listed = set(re.findall(r"^\| `(PYFASTFT_\w+)`", README, flags=re.MULTILINE))
    ours = {v.name for v in VARIABLES if v.name.startswith("PYFASTFT_")}
    assert listed == ours - {"PYFASTFT_TEST_DATA"}
