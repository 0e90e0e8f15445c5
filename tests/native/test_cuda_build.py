"""The CUDA extension as nvcc builds it, on a machine that needs no GPU: registers, spills and
shared memory of every kernel for every target, the width of memory accesses, symbols, import."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
TARGETS = {"sm_80", "sm_90a", "sm_100"}
STATIC_SHARED_BYTES = 48 * 1024
REGISTERS = 65536  # of a multiprocessor
KERNELS = {
    *("row_products", "column_products", "add_product", "add_partials", "dot"),
    *("int4_dequantize", "int4_gemv", "int4_mma", "int4_add_partials"),
    *("masked_step", "select_count", "select_choose", "select_collect", "select_scan"),
}
# The kernels that read a wide matrix, each a whole group of eight elements at a time.
WIDE_KERNELS = {"row_products", "column_products", "add_product"}

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found"),
    pytest.mark.skipif(not all(map(shutil.which, ("cmake", "ninja"))), reason="no cmake or ninja"),
]


@dataclass(frozen=True)
class Built:
    """The extension, and what the compiler printed."""

    extension: Path
    log: str


@pytest.fixture(scope="module")
def built(build_once: Callable[..., Path]) -> Built:
    pybind11 = pytest.importorskip("pybind11")

    def build(tree: Path) -> None:
        configure = ["cmake", "-S", ROOT, "-B", tree, "-G", "Ninja", "-DFASTFT_CUDA=ON"]
        configure += [f"-DCMAKE_CUDA_COMPILER={NVCC}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        subprocess.run(configure, check=True, capture_output=True, timeout=120)
        command = ["cmake", "--build", tree, "--target", "_cuda"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        (tree / "build.log").write_text(done.stdout + done.stderr)

    inputs = [path for path in ROOT.glob("csrc/**/*") if path.is_file()]
    inputs = [path for path in inputs if path.parent.name != "cpu"]
    tree = build_once("cuda", NVCC, [*inputs, ROOT / "CMakeLists.txt"], build)
    (extension,) = tree.glob("_cuda*.so")
    return Built(extension, (tree / "build.log").read_text())


@dataclass(frozen=True)
class Figures:
    kernel: str
    target: str
    stack: int
    spills: int
    registers: int
    shared: int


def figures(log: str) -> Iterator[Figures]:
    """What ptxas printed of every kernel."""
    pattern = (
        r"Compiling entry function '(?P<symbol>\w+)' for '(?P<target>\w+)'\n.*\n"
        r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads\n"
        r".*Used (?P<registers>\d+) registers(?P<rest>.*)\n"
    )
    for found in re.finditer(pattern, log):
        kernel = next(name for name in sorted(KERNELS, key=len)[::-1] if name in found["symbol"])
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield Figures(
            kernel,
            found["target"],
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
            int(found["registers"]),
            int(shared[1]) if shared else 0,
        )


def test_every_kernel_fits_every_target(built: Built) -> None:
    found = list(figures(built.log))
    assert {(f.kernel, f.target) for f in found} == {(k, t) for k in KERNELS for t in TARGETS}
    assert len(found) == built.log.count("Compiling entry function")
    for f in found:
        assert f.spills == 0, f
        assert f.stack == 0, f
        assert f.shared <= STATIC_SHARED_BYTES, f
        assert 256 * f.registers <= REGISTERS, f


def test_nothing_is_warned_of(built: Built) -> None:
    assert "warning" not in built.log.lower()


def cuobjdump() -> str:
    triton = importlib.util.find_spec("triton")
    packed = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    if packed is not None and packed.is_file():
        return str(packed)
    found = shutil.which("cuobjdump")
    if found is None:
        pytest.skip("cuobjdump was not found")
    return found


def test_wide_matrices_move_16_bytes_an_access(built: Built) -> None:
    sass = subprocess.run(
        [cuobjdump(), "--dump-sass", "-arch", "sm_90a", str(built.extension)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kernels = re.split(r"Function : ", sass)[1:]
    seen = set()
    for text in kernels:
        name = next((k for k in WIDE_KERNELS if k in text.splitlines()[0]), None)
        if name is None:
            continue
        seen.add(name)
        assert "LDG.E.128" in text, text.splitlines()[0]
        assert ("STG.E.128" in text) == (name == "add_product"), text.splitlines()[0]
        assert "LDS.128" in text, text.splitlines()[0]
        assert not re.search(r"\b(LDL|STL|ATOM|RED)\b", text), text.splitlines()[0]
    assert seen == WIDE_KERNELS


def test_4_bit_products_run_on_tensor_cores_with_asynchronous_copies(built: Built) -> None:
    sass = subprocess.run(
        [cuobjdump(), "--dump-sass", "-arch", "sm_90a", str(built.extension)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kernels = [text for text in re.split(r"Function : ", sass)[1:] if "int4_" in text[:200]]
    assert any("int4_mma" in text[:200] for text in kernels)
    for text in kernels:
        name = text.splitlines()[0]
        assert not re.search(r"\b(LDL|STL|ATOM|RED)\b", text), name
        if "int4_mma" in name:
            assert "HMMA.16816.F32" in text, name
            assert re.search(r"LDGSTS\S*\.128", text), name
        if "int4_gemv" in name:
            assert re.search(r"LDG\.E\S*\.64", text), name


def test_only_integers_are_added_by_several_threads(built: Built) -> None:
    sass = subprocess.run(
        [cuobjdump(), "--dump-sass", "-arch", "sm_90a", str(built.extension)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(r"\b(?:ATOM|ATOMS|ATOMG|RED|REDG)\.\S+", sass)
    assert any(".ADD" in one or ".POPC.INC" in one for one in found)
    assert not [one for one in found if re.search(r"\.(F16|F32|F64|BF16|FTZ)", one)]


def test_neither_torch_nor_the_driver_is_linked(built: Built) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf was not found")
    dynamic = subprocess.run(
        ["readelf", "-dW", str(built.extension)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic))
    assert needed
    stems = {name.split(".so")[0].split("-")[0] for name in needed}
    allowed = {"libstdc++", "libgcc_s", "libm", "libc", "libpthread", "libdl", "librt", "ld"}
    assert stems <= allowed, needed


def test_the_abi_is_all_that_is_exported(built: Built) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm was not found")
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(built.extension)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    exported = {line.split()[-1] for line in listed.splitlines() if line.strip()}
    api = (ROOT / "csrc/include/fastft/api.h").read_text()
    declared = set(re.findall(r"\b(ft_(?:cuda_\w+|last_error))\(", api))
    assert exported == {*declared, "PyInit__cuda"}


@pytest.fixture(scope="module")
def library(built: Built) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", built.extension)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_importing_needs_no_gpu(library: ModuleType) -> None:
    assert library.lora_down_grad_workspace(100, 300, 8) > 0


def test_a_launch_without_a_gpu_says_so(library: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    sizes = {"m": 1, "k": 8, "r": 1, "x_stride_m": 8}
    with pytest.raises(RuntimeError, match=r"^lora_down: .*(driver|no CUDA-capable device)"):
        library.lora_down(
            xa=0, x=0, lora_a=0, rng=0, threshold=0, dtype=0, adapter_dtype=0, stream=0, **sizes
        )


def test_nothing_is_launched_for_no_elements(library: ModuleType) -> None:
    sizes = {"m": 0, "k": 8, "r": 1, "x_stride_m": 8}
    library.lora_down(
        xa=0, x=0, lora_a=0, rng=0, threshold=0, dtype=0, adapter_dtype=0, stream=0, **sizes
    )
