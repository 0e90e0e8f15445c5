"""What this machine can do at best, measured in the same run as what is compared with it.

On a CPU a few lines of C, compiled at run time for this very machine: multiply-adds in registers
and reads of as many bytes as the case touches. Without a compiler, and on a GPU, PyTorch's matrix
product and copy stand in; ``Probe.how`` says which it was, and every result records it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.resources
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from pyfastft.benchmarks.timer import Candidate

FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-std=gnu11")
_TARGET_S = 8e-3
# OpenMP's threads go on spinning for some milliseconds after a parallel region.
_SETTLE_S = 10e-3


@dataclass(frozen=True)
class Probe:
    """Constant work: how much of it one call does, and in what unit that is counted.

    Attributes:
        candidate: takes part in the run.
        work: operations or bytes per call.
        how: what stands behind the figure.
    """

    candidate: Candidate
    work: float
    how: str


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled probe, or None where there is no compiler that takes it."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = importlib.resources.files(__package__).joinpath("probe.c").read_text()
    with tempfile.TemporaryDirectory(prefix="pyfastft-probe-") as folder:
        name = f"probe-{hashlib.sha256(source.encode()).hexdigest()[:8]}.so"
        target = Path(folder) / name
        command = [compiler, *FLAGS, "-x", "c", "-", "-o", str(target)]
        try:
            done = subprocess.run(command, input=source, text=True, capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        loaded = ctypes.CDLL(str(target))
    for name in ("probe_float32", "probe_bfloat16"):
        function = getattr(loaded, name)
        function.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_float)]
        function.restype = ctypes.c_double
    loaded.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.probe_read.restype = ctypes.c_uint64
    return loaded


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _settle() -> None:
    time.sleep(_SETTLE_S)


def arithmetic(dtype: torch.dtype, device: torch.device) -> Probe:
    """Multiply-adds in a dtype; work in floating-point operations."""
    found = library() if device.type == "cpu" else None
    if found is None:
        return _matrix_product(dtype, device)
    call, how = found.probe_float32, "float32 multiply-adds in registers"
    if dtype is torch.bfloat16 and found.probe_bfloat16(1, ctypes.c_float()) > 0:
        call, how = found.probe_bfloat16, "bfloat16 dot products in registers"
    threads = torch.get_num_threads()
    pool = _pool(threads)

    def run(iterations: int) -> float:
        return sum(pool.map(lambda _: call(iterations, ctypes.c_float()), range(threads)))

    iterations = 10_000
    while _seconds(run, iterations) < _TARGET_S and iterations < 2**30:
        iterations *= 2
    work = run(iterations)
    return Probe(Candidate([lambda: run(iterations)], _settle), work, how)


def reading(size: int, device: torch.device) -> Probe:
    """Memory traffic over a footprint of some bytes; work in bytes."""
    found = library() if device.type == "cpu" else None
    threads = torch.get_num_threads()
    part = max(1, size // threads // 1024) * 1024
    buffer = torch.ones(part * threads + 64, dtype=torch.uint8, device=device)
    if found is None:
        half = buffer.numel() // 2
        source, target = buffer[:half], buffer[half : 2 * half]
        copy = Candidate([lambda: target.copy_(source)])
        return Probe(copy, 2.0 * half, "torch copy, read and written")
    pool = _pool(threads)
    # Small footprints are read several times over, or starting the threads would be measured.
    repeats = max(1, 64 * 2**20 // (part * threads))

    def read(index: int) -> None:
        start = (buffer.data_ptr() + 63) // 64 * 64 + index * part
        for _ in range(repeats):
            found.probe_read(start, part)

    every = Candidate([lambda: list(pool.map(read, range(threads)))], _settle)
    return Probe(every, float(repeats * part * threads), "memory read")


def _matrix_product(dtype: torch.dtype, device: torch.device) -> Probe:
    edge = 8192 if device.type == "cuda" else 1024
    left = torch.randn(edge, edge, device=device).to(dtype)
    right = torch.randn(edge, edge, device=device).to(dtype)
    out = torch.empty_like(left)
    how = f"torch.mm of {edge} x {edge}, a stand-in for the peak"
    return Probe(Candidate([lambda: torch.mm(left, right, out=out)]), 2.0 * edge**3, how)


def _seconds(run: Callable[[int], object], iterations: int) -> float:
    started = time.perf_counter()
    run(iterations)
    return time.perf_counter() - started
