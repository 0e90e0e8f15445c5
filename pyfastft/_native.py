"""The native libraries: loading them, and what their adapters share.

``cpu()`` and ``cuda()`` return the extension modules ``pyfastft._cpu`` and ``pyfastft._cuda``;
where one is absent, ``why_no_cpu()`` and ``why_no_cuda()`` say why.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.resources
import json
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

# Mirrors ft_dtype of csrc/include/fastft/dtype.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Mirrors ft_isa of csrc/include/fastft/api.h: the names that PYFASTFT_CPU_ISA takes.
ISA_LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16")


@functools.cache
def build_info() -> dict[str, Any]:
    """What setup.py recorded: which extensions were built, with what, and why one was not."""
    record = importlib.resources.files("pyfastft").joinpath("_build_info.json")
    if not record.is_file():
        return {"cpu": {"built": False, "why": "this copy of pyfastft was never built"}}
    return json.loads(record.read_text())


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    cap = os.environ.get("PYFASTFT_CPU_ISA")
    if cap and cap not in ISA_LEVELS:
        raise ValueError(f"PYFASTFT_CPU_ISA: expected one of {', '.join(ISA_LEVELS)}, got {cap!r}")
    try:
        return importlib.import_module(f"pyfastft.{name}"), ""
    except ImportError as error:
        record = build_info().get(name.removeprefix("_"), {})
        if record.get("built"):
            return None, f"pyfastft.{name} cannot be loaded: {error}"
        return None, f"pyfastft.{name} was not built: {record.get('why', 'no record of why')}"


@functools.cache
def cpu() -> ModuleType:
    """The CPU extension. Only after ``why_no_cpu()`` returned None."""
    module = _load("_cpu")[0]
    assert module is not None
    return module


@functools.cache
def cuda() -> ModuleType:
    """The CUDA extension. Only after ``why_no_cuda()`` returned None."""
    module = _load("_cuda")[0]
    assert module is not None
    return module


@functools.cache
def why_no_cpu() -> str | None:
    """Why the CPU extension cannot be used, or None where it can."""
    module, why = _load("_cpu")
    return None if module is not None else why


def why_no_cuda() -> str | None:
    """Why the CUDA extension cannot be used, or None where it can."""
    module, why = _load("_cuda")
    if module is None:
        return why
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@contextlib.contextmanager
def cpu_isa(level: str) -> Iterator[None]:
    """Run the CPU kernels at most at one level of :data:`ISA_LEVELS`, in the whole process."""
    library = cpu()
    _, active = library.isa()
    library.set_isa(ISA_LEVELS.index(level))
    try:
        yield
    finally:
        library.set_isa(active)


def address(tensor: torch.Tensor | None) -> int:
    """The tensor's first element's address; 0, a null pointer, for None and for no elements.

    The caller must hold the tensor in a name until the kernel has returned.
    """
    return 0 if tensor is None else tensor.data_ptr()


def stream(device: torch.device) -> int:
    """The handle of the current CUDA stream of a device."""
    return torch.cuda.current_stream(device).cuda_stream
