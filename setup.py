"""Build the native extensions with one CMake and Ninja run, then install the package.

The CPU extension is built wherever there is a C++ compiler, the CUDA extension where nvcc is found
as well. Without a compiler the install is pure Python. What was built, and why something was not,
is recorded in ``pyfastft/_build_info.json``, which ``python -m pyfastft`` prints.

Environment: ``PYFASTFT_CUDA`` 0 builds no CUDA extension, 1 makes its absence an error;
``PYFASTFT_CUDA_ARCHS`` narrows the code emitted, e.g. ``90a-real``; ``CXX`` and ``CUDACXX`` name
the compilers; ``PYFASTFT_SANITIZE`` names sanitizers, e.g. ``address,undefined``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = [
    "CMakeLists.txt",
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.*")) if p.is_file()),
]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def find_tool(name: str) -> str | None:
    """A build tool on the PATH, or beside this Python, whose environment may not be activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def version_of(nvcc: str) -> str:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release \S+ (\S+)", told)
    return found[1] if found else "of unknown version"


def why_no_compiler() -> str | None:
    named = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(compiler) for compiler in named or ("c++", "g++", "clang++")):
        return "no C++ compiler was found; install g++ or set CXX, then reinstall"
    for tool in ("cmake", "ninja"):
        if not find_tool(tool):
            return f"{tool} was not found; install it with pip, then reinstall"
    return None


class CMakeBuild(build_ext):
    """Every extension in one CMake build; a missing toolchain leaves a pure-Python install."""

    def run(self) -> None:
        in_tree = self.editable_mode or self.inplace
        package = ROOT / "pyfastft" if in_tree else Path(self.build_lib) / "pyfastft"
        package.mkdir(parents=True, exist_ok=True)
        info = self.build(package.resolve())
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def build(self, package: Path) -> dict[str, dict[str, object]]:
        missing = why_no_compiler()
        setting = os.environ.get("PYFASTFT_CUDA", "auto")
        if missing and setting == "1":
            raise RuntimeError(f"PYFASTFT_CUDA=1, but nothing can be compiled: {missing}")
        if missing:
            print(f"pyfastft: pure-Python install, {missing}", file=sys.stderr)
            return {name: {"built": False, "why": missing} for name in ("cpu", "cuda")}
        nvcc = find_nvcc()
        if setting == "0":
            why_no_cuda = "PYFASTFT_CUDA=0 was set"
        elif nvcc is None:
            why_no_cuda = "nvcc was not found"
        else:
            why_no_cuda = self.compile(package, ["_cuda"], nvcc)
        if why_no_cuda and setting == "1":
            raise RuntimeError(f"PYFASTFT_CUDA=1, but the CUDA extension is missing: {why_no_cuda}")
        why_no_cpu = self.compile(package, ["_cpu"], None)
        if why_no_cpu:
            raise RuntimeError(f"the CPU extension does not build: {why_no_cpu}")
        if nvcc is None or why_no_cuda:
            for stale in package.glob("_cuda.*.so"):
                stale.unlink()
            return {"cpu": {"built": True}, "cuda": {"built": False, "why": why_no_cuda}}
        return {"cpu": {"built": True}, "cuda": {"built": True, "nvcc": version_of(nvcc)}}

    def compile(self, package: Path, targets: list[str], nvcc: str | None) -> str | None:
        """Configure and build some targets; the reason where that fails."""
        import pybind11

        sanitize = os.environ.get("PYFASTFT_SANITIZE", "")
        kind = ("-cuda" if nvcc else "") + ("-sanitize" if sanitize else "")
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{kind}"
        cmake = find_tool("cmake")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(tree),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTFT_OUTPUT_DIR={package}",
            f"-DFASTFT_SANITIZE={sanitize}",
            f"-DFASTFT_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            archs = os.environ.get("PYFASTFT_CUDA_ARCHS")
            configure += [f"-DFASTFT_CUDA_ARCHS={archs}"] if archs else []
        for command in (configure, [cmake, "--build", str(tree), "--target", *targets]):
            done = subprocess.run(command, capture_output=True, text=True)
            log = tree / f"{targets[0]}.log" if tree.is_dir() else None
            if log:
                log.write_text(done.stdout + done.stderr)
            if done.returncode:
                tail = (done.stdout + done.stderr).strip().splitlines()[-30:]
                print("\n".join(tail), file=sys.stderr)
                return f"cmake {command[1]} failed, see {log}"
        return None


setup(
    packages=[
        "pyfastft",
        *(
            f"pyfastft.{path.parent.relative_to(ROOT / 'pyfastft').as_posix().replace('/', '.')}"
            for path in sorted((ROOT / "pyfastft").glob("*/**/__init__.py"))
        ),
        "pyfastft.triton_kernels",
        *(
            f"pyfastft.triton_kernels.{path.parent.name}"
            for path in sorted((ROOT / "triton_kernels").glob("*/__init__.py"))
        ),
        "pyfastft.benchmarks",
        *(
            f"pyfastft.benchmarks.{path.parent.name}"
            for path in sorted((ROOT / "benchmarks").glob("*/__init__.py"))
        ),
    ],
    package_dir={
        "pyfastft": "pyfastft",
        "pyfastft.triton_kernels": "triton_kernels",
        "pyfastft.benchmarks": "benchmarks",
    },
    package_data={
        "pyfastft": ["py.typed"],
        "pyfastft.native": ["*.json"],
        "pyfastft.triton_kernels": ["*.json"],
        "pyfastft.benchmarks": ["*.c", "bars.toml", "results/**/*"],
    },
    # Named only so that setuptools makes a platform wheel and ships the sources with an sdist;
    # CMakeBuild compiles.
    ext_modules=[Extension("pyfastft._cpu", sources=[], depends=SOURCES)],
    cmdclass={"build_ext": CMakeBuild},
)
