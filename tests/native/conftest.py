"""Builds that tests need: made once, kept in pytest's cache, made anew where a source changes; and
the CUDA kernels on the CPU as a process to call."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pyfastft import _native

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


# -- the CUDA kernels on the CPU -----------------------------------------------------------------


def parameters() -> dict[str, list[str]]:
    """The parameters of every CUDA function of the ABI, from ops.def."""
    text = (ROOT / "csrc/include/fastft/ops.def").read_text()
    found = re.findall(r"^FT_CUDA_OP\((\w+),([^)]*)\)", text, re.MULTILINE)
    return {name: re.findall(r'"(\w+)"', names) for name, names in found}


Argument = torch.Tensor | int | None


class Kernels:
    """The functions of the CUDA ABI in a process of their own."""

    def __init__(self, harness: Path, folder: Path, removed_barrier: int = 0) -> None:
        options = "halt_on_error=1:exitcode=66"
        self.folder = folder
        self.names = parameters()
        self.process = subprocess.Popen(
            [str(harness)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TSAN_OPTIONS": options, "ASAN_OPTIONS": "detect_leaks=0"},
        )
        self.send(str(removed_barrier))

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self) -> str:
        """Ends the process; what it wrote on stderr."""
        return self.process.communicate(timeout=60)[1]

    def request(self, function: str, words: list[str]) -> None:
        self.send(" ".join([function, *words]))
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if answer.startswith("error "):
            raise RuntimeError(answer.removeprefix("error "))
        if answer != "ok":
            raise ChildProcessError(self.process.communicate()[1])

    def call(self, function: str, **arguments: Argument | list[Argument]) -> None:
        """Call by name; a tensor's whole storage goes there and comes back. A list is a table of
        64 bits each, addresses among them."""
        words: list[str] = []
        files: list[tuple[Path, torch.Tensor]] = []

        def add(name: str, value: Argument) -> None:
            if isinstance(value, torch.Tensor):
                path = self.folder / name
                storage = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
                path.write_bytes(storage.numpy().tobytes())
                files.append((path, storage))
                words.append(f"{path}@{value.storage_offset() * value.element_size()}")
            else:
                words.append("null" if value is None else str(value))

        for name in self.names[function]:
            value = arguments.pop(name)
            if isinstance(value, list):
                words.append(f"{{{len(value)}")
                for i, one in enumerate(value):
                    add(f"{name}{i}", one)
                words.append("}")
            else:
                add(name, value)
        assert not arguments, f"{function} has no {', '.join(arguments)}"
        self.request(function, words)
        for path, storage in files:
            if storage.numel():
                storage.copy_(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8))

    def workspace(self, function: str, *sizes: int) -> torch.Tensor:
        path = self.folder / "floats"
        path.write_bytes(bytes(8))
        self.request(f"{function}_workspace", [f"{path}@0", *map(str, sizes)])
        return torch.full((int.from_bytes(path.read_bytes(), "little"),), torch.nan)


@pytest.fixture(scope="session")
def harness(compile_simt: Callable[..., Path]) -> Callable[[str], Path]:
    """The harness built with some sanitizers."""

    def build(sanitizers: str) -> Path:
        flags = ["-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        return compile_simt(f"simt-{sanitizers}", SIMT / "harness.cpp", *flags)

    return build


@pytest.fixture(scope="session")
def kernels(
    harness: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kernels]:
    """The kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    running = Kernels(harness("address,undefined"), tmp_path_factory.mktemp("simt"))
    yield running
    assert running.close() == ""


@pytest.fixture
def racing(harness: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[[int], Kernels]]:
    """Starts the kernels under ThreadSanitizer, with one barrier of every block removed."""
    started: list[Kernels] = []

    def start(removed_barrier: int) -> Kernels:
        started.append(Kernels(harness("thread"), tmp_path, removed_barrier))
        return started[-1]

    yield start
    for running in started:
        running.close()


@pytest.fixture
def fresh_kernels(harness: Callable[[str], Path], tmp_path: Path) -> Kernels:
    """The kernels under the same, in a process of the test's own, which may end."""
    return Kernels(harness("address,undefined"), tmp_path)


@pytest.fixture(scope="session")
def simt_module(compile_simt: Callable[..., Path]) -> ModuleType:
    """The CUDA extension with its kernels on the CPU."""
    pybind11 = pytest.importorskip("pybind11")
    flags = ["-shared", "-fPIC", "-fvisibility=hidden", "-DFT_BIND_CUDA"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    file = compile_simt("simt-module", ROOT / "csrc/bindings/module.cpp", *flags)
    # A name of its own: pybind11 gives a module that has the name of an earlier one that one.
    loader = importlib.machinery.ExtensionFileLoader("simt._cuda", str(file))
    spec = importlib.util.spec_from_loader("simt._cuda", loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def adapter(simt_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CUDA adapters call it."""
    monkeypatch.setattr(_native, "cuda", lambda: simt_module)
    monkeypatch.setattr(_native, "stream", lambda device: 0)
