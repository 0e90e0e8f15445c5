"""The house rules of CONTRIBUTING.md as assertions: where things stand, and what may not appear."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

import pyfastft as ft
from pyfastft._op import FOLDERS, REGISTRY

ROOT = Path(__file__).parent.parent
FAMILIES = ("lora", "masked", "ptq4", "prune", "mcf")
# Where a family has a place: only what exists is checked, and what exists may be a file or, past
# 600 lines, a folder with one file per op.
PLACES = {
    "contract": ("pyfastft/ops", ".py"),
    "derivation": ("pyfastft/ops", ".md"),
    "reference": ("pyfastft/reference", ".py"),
    "adapter": ("pyfastft/native", ".py"),
    "CPU kernel": ("csrc/cpu", ".cpp"),
    "Triton kernels": ("triton_kernels", ".py"),
    "tests": ("tests/ops", ".py"),
    "benchmark": ("benchmarks", ".py"),
}
PREFIX = {"tests": "test_", "benchmark": "bench_"}
LONGEST_FILE = 600
LONGEST_LINE = 100
SOURCES = (".py", ".cpp", ".hpp", ".h", ".cu", ".cuh")


def files(*suffixes: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in suffixes and path.is_file()]


def present(family: str) -> bool:
    return any(op.family == family for op in REGISTRY.values())


@pytest.mark.parametrize("family", [f for f in FAMILIES if present(f)])
@pytest.mark.parametrize("place", PLACES)
def test_a_family_has_its_file_in_every_folder(family: str, place: str) -> None:
    folder, suffix = PLACES[place]
    name = PREFIX.get(place, "") + family
    file, directory = ROOT / folder / f"{name}{suffix}", ROOT / folder / name
    assert file.is_file() or directory.is_dir(), f"{family} has no {place}: {file} is missing"
    assert not (file.is_file() and directory.is_dir() and suffix == ".py")


def test_every_op_belongs_to_a_family_and_has_a_reference() -> None:
    for op in REGISTRY.values():
        assert op.family in FAMILIES
        assert not isinstance(op.impl("reference"), str), op.impl("reference")


def test_a_folder_holds_only_families_and_shared_helpers() -> None:
    for folder in {*FOLDERS.values(), "pyfastft.ops"}:
        # One folder of the package stands at the top of the checkout.
        outside = ROOT / folder.removeprefix("pyfastft.")
        path = outside if outside.is_dir() else ROOT / folder.replace(".", "/")
        for file in path.glob("*.py"):
            assert file.stem in FAMILIES or file.stem.startswith("_"), f"{file} is no family"


def test_no_public_function_shares_a_submodule_name() -> None:
    package = ROOT / "pyfastft"
    modules = {p.stem for p in package.glob("*.py")} | {p.name for p in package.iterdir()}
    for name in ft.__all__:
        if name in modules:
            assert isinstance(getattr(ft, name), type(ft)), f"{name} hides a submodule"


@pytest.mark.parametrize("path", files(*SOURCES), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_can_be_held_in_the_head(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= LONGEST_FILE, f"{len(lines)} lines"
    for number, line in enumerate(lines, 1):
        assert len(line) <= LONGEST_LINE, f"line {number} has {len(line)} characters"


# cast_impl is what Triton's interpreter calls the method that the tests repair.
BANNED = {
    "a torch header in csrc": (r'#include *[<"](torch|ATen|c10)/', "csrc/"),
    "a build flag for an instruction set": (r"(?<!No )-mavx|-march=native|-ffast-math", "CMake"),
    "a literal tolerance": (r"\b(atol|rtol) *=", "tests/"),
    "a bare except": (r"except *:", ""),
    "unpickling": (r"weights_only *= *False|pickle\.loads?\(", "pyfastft/"),
    "something left for later": (r"\b(TODO|FIXME|XXX)\b", ""),
    "a numbered or boasting name": (r"def (?!cast_impl)\w+(_v\d+|_new|_fast|_impl|_old)\b", ""),
    "a launch-time autotuner": (r"@triton\.autotune", ""),
}


@pytest.mark.parametrize("what", BANNED)
def test_what_may_not_appear(what: str) -> None:
    pattern, place = BANNED[what]
    found = []
    for path in files(*SOURCES, ".txt"):
        name = str(path.relative_to(ROOT))
        if name.startswith(place) and path != Path(__file__):
            lines = enumerate(path.read_text().splitlines(), 1)
            found += [f"{name}:{number}" for number, line in lines if re.search(pattern, line)]
    assert not found, f"{what}: {found}"


def undocumented(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    names = {node.name for node in public if not ast.get_docstring(node)}
    return names if ast.get_docstring(tree) else names | {"the module"}


LIBRARY = [
    p for p in files(".py") if p.relative_to(ROOT).parts[0] in ("pyfastft", "triton_kernels")
]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_things_say_what_they_are(path: Path) -> None:
    # An op's implementation is described by its contract.
    assert not undocumented(path) - set(REGISTRY)


def test_every_op_is_documented_for_users() -> None:
    for name in ft.functional.__all__:
        text = getattr(ft.functional, name).__doc__
        for part in ("Args:", "Returns:", "Raises:", "Reference:", ".. math::"):
            assert part in text, f"{name} lacks {part}"
