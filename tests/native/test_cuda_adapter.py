"""The CUDA adapter without a GPU: its calls reach the real binding, over kernels that g++ compiled
against ``simt/cuda_runtime.h``, so every sample of the op is run end to end."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pyfastft import _native, backend
from pyfastft._op import REGISTRY
from pyfastft.testing.samples import PRECISIONS, Precision, Sample, samples, upcast
from pyfastft.testing.tolerance import assert_accurate

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
OPS = ("lora_linear", "lora_projections", "lora_adapters", "int4_linear", "int4_lora_linear")
SAMPLES = [s for op in OPS for way in ("", "_backward") for s in samples(op + way)]
SAMPLES += samples("int4_dequantize")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")


@pytest.fixture(scope="module")
def library(compile_simt: Callable[..., Path]) -> ModuleType:
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
def adapter(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda", lambda: library)
    monkeypatch.setattr(_native, "stream", lambda device: 0)


def flat(outputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """The outputs, those of a list among them each by itself."""
    return [one for out in outputs for one in (out if isinstance(out, list) else (out,))]


def runs() -> Iterator[object]:
    for sample in SAMPLES:
        for precision in PRECISIONS:
            few = precision in (PRECISIONS[0], PRECISIONS[3]) and not sample.large
            marks = () if few else pytest.mark.more
            name = f"{sample.op}-{sample}-{precision}"
            yield pytest.param(sample, precision, id=name, marks=marks)


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize(("sample", "precision"), list(runs()))
def test_truth(sample: Sample, precision: Precision) -> None:
    op = REGISTRY[sample.op]
    args = sample.build(precision, CPU)
    actual = op.contract(*args)
    op.impl("cuda").launch(*actual, *args)
    with backend("reference"):
        truth, naive = op(*upcast(args)), op(*args)
    gradient = sample.op.endswith("_backward")
    outputs = zip(*map(flat, (actual, truth, naive)), strict=True)
    for i, (a, t, n) in enumerate(outputs):
        assert_accurate(a, t, n, gradient=gradient, what=f"output {i} of {sample}")


@pytest.mark.parametrize("name", OPS)
def test_reasons_without_a_gpu(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    op = REGISTRY[name]
    args = next(samples(name)).build(PRECISIONS[0], CPU)
    assert op.impl("cuda").unsupported(*args) == _native.why_no_cuda() is not None
    assert "float64 is not one of" in op.impl("cuda").unsupported(*upcast(args))
