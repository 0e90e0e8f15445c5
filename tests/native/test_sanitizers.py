"""The native tests once more, on an extension built with AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZERS = ("asan", "ubsan")

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree"),
]


def runtimes() -> str:
    """Both libraries, to be loaded before Python's own allocations; skips where absent."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    found = []
    for name in SANITIZERS:
        query = [*compiler, f"-print-file-name=lib{name}.so"]
        path = subprocess.check_output(query, text=True).strip()
        if not os.path.isabs(path):
            pytest.skip(f"the compiler has no lib{name}")
        found.append(path)
    return ":".join(found)


@pytest.fixture(scope="module")
def sanitized(build_once: Callable[..., Path]) -> tuple[Path, dict[str, str]]:
    """A folder with the package built under both sanitizers, and the environment to run it in."""
    preload = runtimes()
    variables = {"PYFASTFT_SANITIZE": "address,undefined", "PYFASTFT_CUDA": "0"}

    def build(folder: Path) -> None:
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder)],
            cwd=ROOT,
            env={**os.environ, **variables},
            check=True,
            capture_output=True,
            timeout=1200,
        )

    parts = ("csrc", "pyfastft", "triton_kernels", "benchmarks")
    inputs = [path for part in parts for path in (ROOT / part).rglob("*.*") if path.is_file()]
    inputs = [path for path in inputs if path.suffix in (".py", ".cpp", ".hpp", ".h", ".def")]
    inputs += [ROOT / "CMakeLists.txt", ROOT / "setup.py"]
    folder = build_once("sanitized", variables, inputs, build)
    environment = {
        **os.environ,
        "LD_PRELOAD": preload,
        # Python does not free all that it allocates, and its own allocator would hide overflows.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    return folder, environment


def python(sanitized: tuple[Path, dict[str, str]], *arguments: str) -> subprocess.CompletedProcess:
    folder, environment = sanitized
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )


OVERFLOW = """
import torch
from pyfastft import _native, ops
assert _native.cpu().__file__.startswith({folder!r}), _native.cpu().__file__
x, weight, a, b = torch.ones(8, 64), torch.ones(32, 64), torch.ones(2, 64), torch.ones(32, 2)
rng, scaling, y, xa = torch.tensor([1, 2]), torch.ones(()), torch.empty(8, 32), torch.empty(8, 2)
_native.cpu().lora_linear(
    y=y.data_ptr(), xa=xa.data_ptr(), x=x.data_ptr(), weight=weight.data_ptr(),
    lora_a=a.data_ptr(), lora_b=b.data_ptr(), bias=0, scaling=scaling.data_ptr(),
    rng=rng.data_ptr(), gate=0, packed=0, packed_dx=0, m=8 + {surplus}, n=32, k=64, r=2,
    x_stride_m=64, x_stride_k=1, weight_stride_n=64, weight_stride_k=1, gate_stride_m=0,
    packed_bytes=0, packed_dx_bytes=0, threshold=0, dtype=0, adapter_dtype=0, accumulate=0,
    threads=1,
)
print("computed", y[0, 0].item())
"""


@pytest.mark.parametrize("surplus", [0, 1])
def test_one_row_too_many_is_caught(sanitized, surplus: int) -> None:
    """So that the next test means something: the same call passes with the right size only."""
    done = python(sanitized, "-c", OVERFLOW.format(folder=str(sanitized[0]), surplus=surplus))
    if surplus:
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr
        assert "lora" in done.stderr, "no source of ours in the report"
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"computed {64 + 2 * 64}.0\n"


# What inspects a library or a process; what is about CUDA builds harnesses of its own.
ELSEWHERE = ("abi", "cuda", "large", "process", "sanitizers")
NATIVE = [
    path
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    if path.stem.split("_")[1] not in ELSEWHERE
]


# Of what files that are damaged leave readable, weights are made.
OTHERS = [ROOT / "tests/test_registry.py", ROOT / "tests/formats/test_corrupted.py"]


@pytest.mark.parametrize("path", [*OTHERS, *NATIVE], ids=lambda p: p.stem)
def test_native_tests_are_clean(sanitized, path: Path) -> None:
    only = ("-k", "test_truth and cpu-") if path.stem == "test_registry" else ()
    done = python(
        sanitized,
        *(
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:xdist",
            "-o",
            f"cache_dir={sanitized[0] / '.cache'}",
        ),
        *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)),
        *("-m", "not more and not slow and not gpu", str(path), *only),
    )
    report = done.stdout[-3000:] + done.stderr[-5000:]
    assert done.returncode == 0, report
    assert " passed" in done.stdout
    assert "runtime error" not in done.stderr, report
