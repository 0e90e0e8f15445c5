"""Importing pyfastft: what it loads, what it leaves alone, and what it offers."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
import types

import pytest

import pyfastft as ft

MEASURE = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import pyfastft
seconds = time.perf_counter() - start
print(seconds, torch.cuda.is_initialized(), *sorted(set(sys.modules) - before))
"""
# Of torch's own, what costs seconds to import.
HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed", "torch.onnx", "torch.testing")


@pytest.fixture(scope="module")
def imported() -> list[str]:
    """What MEASURE prints, with every warning an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURE], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1, "something was printed"
    return done.stdout.split()


def test_it_loads_nothing_but_itself(imported: list[str], record_property) -> None:
    record_property("seconds_over_torch", float(imported[0]))
    new = imported[2:]
    assert "pyfastft.functional" in new
    allowed = sys.stdlib_module_names | {"pyfastft", "torch"}
    assert [name for name in new if name.split(".")[0] not in allowed] == []
    assert [name for name in new if name.startswith(HEAVY)] == []


def test_it_compiles_and_loads_no_kernel(imported: list[str]) -> None:
    kernels = ("pyfastft._cpu", "pyfastft._cuda", "pyfastft.native.", "pyfastft.triton_kernels")
    assert [name for name in imported if name.startswith(kernels)] == []


def test_it_touches_no_device(imported: list[str]) -> None:
    assert imported[1] == "False"


def test_types_are_shipped() -> None:
    assert importlib.resources.files("pyfastft").joinpath("py.typed").is_file()


def test_all_is_the_api() -> None:
    for name in ft.__all__:
        getattr(ft, name)
    offered = {
        name
        for name in dir(ft)
        if not name.startswith("_") and not isinstance(getattr(ft, name), types.ModuleType)
    }
    modules = {name for name in ft.__all__ if isinstance(getattr(ft, name), types.ModuleType)}
    assert offered | modules == set(ft.__all__)
