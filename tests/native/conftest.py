"""Builds that tests need: made once, kept in pytest's cache, made anew where a source changes."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIMT = Path(__file__).parent / "simt"


@pytest.fixture(scope="session")
def build_once(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """``build_once(name, key, inputs, build)``: a folder that ``build(folder)`` has filled.

    Built again only where the key or an input has changed, and by one of several workers.
    """

    def run(name: str, key: object, inputs: list[Path], build: Callable[[Path], None]) -> Path:
        cache = request.config.cache.mkdir("native")
        state = hashlib.sha256(repr(key).encode())
        for path in sorted(inputs):
            state.update(path.name.encode() + path.read_bytes())
        folder = cache / f"{name}-{state.hexdigest()[:16]}"
        with open(cache / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / ".done").exists():
                for old in cache.glob(f"{name}-*"):
                    shutil.rmtree(old)
                folder.mkdir()
                build(folder)
                (folder / ".done").touch()
        return folder

    return run


@pytest.fixture(scope="session")
def compile_simt(build_once: Callable[..., Path]) -> Callable[..., Path]:
    """``compile_simt(name, source, *flags)``: a program with the CUDA kernels, for the CPU."""

    def run(name: str, source: Path, *flags: str) -> Path:
        sources = [source, *sorted(ROOT.glob("csrc/cuda/*.cu"))]
        headers = [*SIMT.glob("*.h"), *ROOT.glob("csrc/cuda/*.cuh"), *ROOT.glob("csrc/include/*/*")]
        command = ["g++", "-std=c++17", "-O1", "-pthread", "-Wall", "-Wno-unknown-pragmas"]
        # As on a GPU, memory is read in groups of elements.
        command += ["-fno-strict-aliasing"]
        command += [f"-I{folder}" for folder in (SIMT, ROOT / "csrc/include", ROOT / "csrc")]
        command += [*flags, "-x", "c++", *map(str, sources)]

        def build(folder: Path) -> None:
            subprocess.run([*command, "-o", str(folder / "built")], check=True, timeout=600)

        return build_once(name, command, [*sources, *headers], build) / "built"

    return run
