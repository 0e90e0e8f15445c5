"""What every test runs under: Triton's interpreter where there is no GPU, a fixed seed, NaN-filled
outputs, and real data where the environment names it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

if not torch.cuda.is_available():
    # Before any kernel is defined: Triton decides then.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

INTERPRETER = HERE / "triton" / "interpreter.py"
if os.environ.get("TRITON_INTERPRET") == "1" and INTERPRETER.exists():
    spec = importlib.util.spec_from_file_location("pyfastft_test_interpreter", INTERPRETER)
    interpreter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interpreter)
    interpreter.apply()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN: a kernel that leaves an element unwritten fails its test."""
    from pyfastft import _alloc

    allocate = _alloc.empty

    def poisoned(shape, *, like, dtype=None):
        tensor = allocate(shape, like=like, dtype=dtype)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max if tensor.dtype != torch.bool else True)

    monkeypatch.setattr(_alloc, "empty", poisoned)


@pytest.fixture
def data() -> Path:
    """The folder of real data. Unset it skips; set, a missing file is a failure."""
    folder = os.environ.get("PYFASTFT_TEST_DATA")
    if not folder:
        pytest.skip("PYFASTFT_TEST_DATA is not set")
    return Path(folder)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
