"""The CUDA adapter without a GPU: its calls reach the real binding, over kernels that g++ compiled
against ``simt/cuda_runtime.h``, so every sample of the op is run end to end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pyfastft import _native, backend
from pyfastft._op import REGISTRY
from pyfastft.testing.samples import PRECISIONS, Precision, Sample, samples, upcast
from pyfastft.testing.samples.ptq4._weights import Int4Shape
from pyfastft.testing.samples.ptq4.linear import arguments as int4_arguments
from pyfastft.testing.tolerance import assert_accurate
from pyfastft.triton_kernels import _int4_engine

CPU = torch.device("cpu")
OPS = ("lora_linear", "lora_projections", "lora_adapters", "int4_linear", "int4_lora_linear")
SAMPLES = [s for op in OPS for way in ("", "_backward") for s in samples(op + way)]
SAMPLES += samples("int4_dequantize")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")


def flat(outputs: torch.Tensor | tuple[Any, ...]) -> list[torch.Tensor]:
    """The outputs, those of a list among them each by itself."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
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
    op.impl("cuda").launch(*(actual if isinstance(actual, tuple) else (actual,)), *args)
    with backend("reference"):
        truth, naive = op(*upcast(args)), op(*args)
    gradient = sample.op.endswith("_backward")
    outputs = zip(*map(flat, (actual, truth, naive)), strict=True)
    for i, (a, t, n) in enumerate(outputs):
        assert_accurate(a, t, n, gradient=gradient, what=f"output {i} of {sample}")


# What int4_linear computes where it was measured to be faster, beside the panels of the samples.
ENGINES = (
    ("gemv", Int4Shape("gemv", (2,), 19, 1056, 32, zero="uint8", perm=True)),
    ("gemv", Int4Shape("gemv-table", (1,), 9, 77, 16, codebook="fp4", half_scale=True)),
    ("mma", Int4Shape("mma", (9,), 33, 160, 32, zero="float", half_scale=True)),
    ("mma", Int4Shape("mma-table", (3, 6), 20, 64, 64, codebook="nf4", bias=False)),
    ("product", Int4Shape("product", (40,), 70, 96, 32, zero="uint8")),
)


def check_engine(engine: str, shape: Int4Shape, device: torch.device) -> None:
    args = int4_arguments(shape, PRECISIONS[1], device)
    op = REGISTRY["int4_linear"]
    y = op.contract(*args)
    with _int4_engine.forced(engine):
        assert op.impl("cuda").engine(*args).startswith(engine)
        op.impl("cuda").launch(y, *args)
    with backend("reference"):
        assert_accurate(y, op(*upcast(args)), op(*args))


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize(("engine", "shape"), [one for one in ENGINES if one[0] != "product"])
def test_engines(engine: str, shape: Int4Shape) -> None:
    check_engine(engine, shape, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "shape"), ENGINES)
def test_engines_on_a_gpu(engine: str, shape: Int4Shape) -> None:
    if _native.why_no_cuda() is not None:
        pytest.skip(str(_native.why_no_cuda()))
    check_engine(engine, shape, torch.device("cuda"))


@pytest.mark.parametrize("name", OPS)
def test_reasons_without_a_gpu(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    op = REGISTRY[name]
    args = next(samples(name)).build(PRECISIONS[0], CPU)
    assert op.impl("cuda").unsupported(*args) == _native.why_no_cuda() is not None
    assert "float64 is not one of" in op.impl("cuda").unsupported(*upcast(args))
