"""Every environment variable that pyfastft reads: the one table, printed by ``pyfastft doctor``."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """An environment variable, when it is read, and what is in effect where it is unset."""

    name: str
    read: str  # "run", "build", "tests" or "demo"
    default: str
    meaning: str

    @property
    def value(self) -> str | None:
        """What the environment holds; an empty string counts as unset."""
        return os.environ.get(self.name) or None

    @property
    def effective(self) -> str:
        """The value in effect."""
        return self.value or self.default


VARIABLES = (
    Variable(
        "PYFASTFT_BACKEND",
        "run",
        "auto",
        "run every op on cpu, cuda, triton or reference; auto chooses by device",
    ),
    Variable(
        "PYFASTFT_STRICT",
        "run",
        "0",
        "1 makes it an error that an op falls back to the reference",
    ),
    Variable(
        "PYFASTFT_CPU_ISA",
        "run",
        "highest this CPU has",
        "cap the CPU kernels at scalar, avx2, avx512 or avx512_bf16",
    ),
    Variable(
        "PYFASTFT_LORA_ENGINE",
        "run",
        "auto",
        "compute lora on a GPU with gemm, fused or decode where they can; auto goes by measurement",
    ),
    Variable(
        "PYFASTFT_INT4_ENGINE",
        "run",
        "auto",
        "compute int4_linear on a GPU with panels, gemv, mma or product; auto goes by measurement",
    ),
    Variable(
        "PYFASTFT_DETERMINISTIC",
        "run",
        "1",
        "0 lets lora_linear on a CPU take torch's GEMM where that was measured to be faster",
    ),
    Variable(
        "TRITON_INTERPRET",
        "run",
        "0",
        "1 runs the Triton kernels in Triton's interpreter, without a GPU; slow, for tests",
    ),
    Variable(
        "HF_HUB_OFFLINE",
        "demo",
        "1",
        "pyfastft demo --model sets it to 1: nothing is ever downloaded",
    ),
    Variable(
        "KINETO_LOG_LEVEL",
        "demo",
        "99",
        "pyfastft demo sets it to 99: torch's profiler, which measures memory, stays silent",
    ),
    Variable(
        "PYFASTFT_CUDA",
        "build",
        "auto",
        "0 builds no CUDA extension, 1 makes its absence an error",
    ),
    Variable(
        "PYFASTFT_CUDA_ARCHS",
        "build",
        "all supported",
        "narrow the GPU code that is built, for example 90a-real",
    ),
    Variable(
        "PYFASTFT_SANITIZE",
        "build",
        "none",
        "build the extensions with sanitizers, for example address,undefined",
    ),
    Variable("CXX", "build", "c++", "the C++ compiler"),
    Variable("CUDACXX", "build", "nvcc", "the CUDA compiler"),
    Variable("CUDA_HOME", "build", "/usr/local/cuda", "where nvcc is looked for last"),
    Variable(
        "PYFASTFT_TEST_DATA",
        "tests",
        "none",
        "the folder of real data and weights; tests that need it skip where it is unset",
    ),
)
