"""The package as users get it: sdist, wheel, editable, without a compiler, and off x86-64. Built
from a copy of the tree, and used in a virtual environment of its own."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pyfastft

ROOT = Path(__file__).parents[1]
NOT_COPIED = ("build", "dist", ".*", "*.egg-info", "*.so", "_build_info.json", "__pycache__")
USE = """
import importlib.resources, torch
import pyfastft as ft
files = importlib.resources.files("pyfastft")
assert files.joinpath("py.typed").is_file()
from pyfastft import benchmarks, triton_kernels
torch.manual_seed(0)
x, w, a, b = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
with ft.backend(BACKEND):
    y = ft.lora_linear(x, w, a, b)
torch.testing.assert_close(y, x @ w.T + x @ a.T @ b.T)
print(ft.__file__)
"""
EXPLAIN = """
import torch, pyfastft as ft
t = torch.ones(2, 2)
print(ft.explain("lora_linear", t, t, t, t, None, torch.ones(())))
"""
LEVELS = """
import ctypes, sys
detected, active = ctypes.c_int32(9), ctypes.c_int32(9)
library = ctypes.CDLL(sys.argv[1])
assert library.ft_cpu_isa(ctypes.byref(detected), ctypes.byref(active)) == 0
print(detected.value, active.value)
"""
# The numbers are what the other tests check.
DOCTOR = ("-m", "pyfastft", "doctor", "--no-selftest")

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree"),
]


def run(*command: object, cwd: Path, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, "PYFASTFT_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with nothing built."""
    folder = tmp_path_factory.mktemp("tree") / "pyfastft"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return folder


def environment(folder: Path) -> Path:
    """The Python of a virtual environment that sees what this one has, except pyfastft."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, cwd=folder).strip())
    # As a plain path, without this environment's .pth files: those make pyfastft importable.
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: object, cwd: Path, **variables: str) -> None:
    pip = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-q")
    run(*pip, "--ignore-installed", *what, cwd=cwd, **variables)


def use(python: Path, backend: str, cwd: Path) -> Path:
    """Import and compute; where pyfastft came from."""
    code = USE.replace("BACKEND", repr(backend))
    return Path(run(python, "-c", code, cwd=cwd).strip().splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the sdist: what the sdist forgets, the wheel lacks."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    run(*build, "--sdist", tree, cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    run(*build, "--wheel", folder / sdist.name.removesuffix(".tar.gz"), cwd=folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(n for n in names if n.endswith("METADATA"))
        text = archive.read(metadata).decode()
    assert f"Version: {pyfastft.__version__}\n" in text
    places = {"pyfastft": "pyfastft", "triton_kernels": "pyfastft/triton_kernels"}
    places["benchmarks"] = "pyfastft/benchmarks"
    wanted = {
        str(Path(place) / path.relative_to(ROOT / folder))
        for folder, place in places.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    wanted |= {"pyfastft/py.typed", "pyfastft/_build_info.json"}
    wanted |= {f"pyfastft/triton_kernels/_{name}.json" for name in ("engine", "int4_engine")}
    wanted.add("pyfastft/native/_cpu_engine.json")
    for name in ("bars.toml", "results", "probe.c"):
        source = ROOT / "benchmarks" / name
        files = source.rglob("*") if source.is_dir() else [source] * source.is_file()
        wanted |= {
            str(Path("pyfastft/benchmarks") / f.relative_to(ROOT / "benchmarks"))
            for f in files
            if f.is_file()
        }
    assert wanted <= names, wanted - names
    extension = f"pyfastft/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert extension in names
    others = {n for n in names - wanted - {extension} if ".dist-info/" not in n}
    assert {n for n in others if not n.endswith((".md", ".toml"))} == set()


def test_the_wheel_works(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    install(python, wheel, cwd=tmp_path)
    assert (tmp_path / "venv") in use(python, "cpu", tmp_path).parents
    told = run(python, *DOCTOR, cwd=tmp_path)
    assert pyfastft.__version__ in told
    assert "lora_linear" in told


def test_an_editable_install_works(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("build"))
    python = environment(tmp_path / "venv")
    # Unoptimised: this is about where things come from.
    install(python, "-e", copy, cwd=tmp_path, CMAKE_BUILD_TYPE="Debug")
    assert use(python, "cpu", tmp_path) == copy / "pyfastft" / "__init__.py"


def test_without_a_compiler_it_installs_as_pure_python(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("build"))
    python = environment(tmp_path / "venv")
    nothing = {"PATH": str(tmp_path), "CXX": ""}
    install(python, copy, cwd=tmp_path, **nothing)
    assert (tmp_path / "venv") in use(python, "reference", tmp_path).parents
    why = "no C++ compiler was found"
    assert why in run(python, *DOCTOR, cwd=tmp_path)
    explained = run(python, "-c", EXPLAIN, cwd=tmp_path)
    assert "lora_linear on cpu: reference" in explained
    assert why in explained


def test_cuda_asked_for_and_absent_is_an_error(tree: Path, tmp_path: Path) -> None:
    """PYFASTFT_CUDA=1 never ends in a package without it."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")],
        cwd=tree,
        env={"PATH": str(tmp_path), "PYFASTFT_CUDA": "1", "CXX": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "PYFASTFT_CUDA=1" in done.stderr


def test_other_machines_compile_the_scalar_level(tmp_path: Path) -> None:
    """Every CPU source with the compiler's name of this machine taken away, after the standard
    headers have been read with it."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = sorted((ROOT / "csrc/cpu").rglob("*.cpp"))
    texts = [p.read_text() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".hpp")]
    texts += [p.read_text() for p in sources]
    standard = {
        n for text in texts for n in re.findall(r"^#include <([a-z_/]+(?:\.h)?)>", text, re.M)
    }
    standard -= {n for n in standard if "intrin" in n or "cuda" in n or "pybind" in n}
    prelude = [f"#include <{name}>" for name in sorted(standard)]
    (tmp_path / "elsewhere.h").write_text("\n".join([*prelude, "#undef __x86_64__", ""]))
    library = tmp_path / "scalar.so"
    run(
        *(compiler, "-std=c++17", "-O1", "-fopenmp", "-fPIC", "-shared", "-Wall", "-Werror"),
        *("-Wno-unknown-pragmas", "-include", tmp_path / "elsewhere.h"),
        *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", *sources, "-o", library),
        cwd=tmp_path,
    )
    assert run(sys.executable, "-c", LEVELS, library, cwd=tmp_path) == "0 0\n"


def test_this_environment_is_in_the_declared_ranges() -> None:
    declared = importlib.metadata.metadata("pyfastft")
    assert SpecifierSet(declared["Requires-Python"]).contains(platform.python_version())
    requirements = [Requirement(text) for text in declared.get_all("Requires-Dist")]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert {"torch", "numpy", "safetensors", "tqdm"} <= {r.name for r in needed}
    for requirement in needed:
        version = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(version, prereleases=True), requirement
