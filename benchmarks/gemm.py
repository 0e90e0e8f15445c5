"""The CPU's GEMM core by itself, beside torch's product and the machine's peak."""

from __future__ import annotations

import dataclasses

import torch

from pyfastft.benchmarks.measure import DTYPES, Case, medians
from pyfastft.native import _gemm
from pyfastft.native._packing import pack
from pyfastft.testing.tolerance import assert_accurate

_SHAPES = ((512, 512, 512), (1024,) * 3, (2048,) * 3, (4096,) * 3, (2048, 1024, 4096))


def gemm(case: Case, device: torch.device) -> dict[str, float]:
    """C = A Wᵀ from the case's M up, W packed in the call ("plain") and once before ("packed").

    Of all sizes the lowest: percent of the peak, and how many times as fast as torch.mm, which has
    W as it lies and writes into an output that is there, as ours does. The case's M by itself
    beside them.
    """
    if device.type != "cpu":
        raise NotImplementedError("the core is the CPU's")
    sizes = [shape for shape in _SHAPES if shape[0] >= case.shape[0]]
    found = [product(dataclasses.replace(case, shape=shape)) for shape in sizes]
    lowest = {name: min(numbers[name] for numbers in found) for name in found[0]}
    return {**lowest, **{f"{name}, M = {case.shape[0]}": v for name, v in found[0].items()}}


def product(case: Case) -> dict[str, float]:
    """The figures of one product."""
    torch.manual_seed(0)
    m, k, n = case.shape
    dtype = DTYPES[case.dtype]
    a, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    packed = pack(w)
    ours, theirs = torch.empty(m, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
    once = torch.empty_like(ours)
    steps = {
        "plain": lambda: _gemm.matmul(ours, a, w),
        "packed": lambda: _gemm.matmul(once, a, packed_b=packed),
        "torch.mm": lambda: torch.mm(a, w.T, out=theirs),
    }
    for step in steps.values():
        step()
    rows = slice(0, 64)  # the float64 product of all would take longer than what is measured
    assert_accurate(ours[rows], a[rows].double() @ w.double().T, theirs[rows])
    if not torch.equal(ours, once):
        raise AssertionError("a weight that is packed before gives other bits")
    times = medians(steps, dtype, torch.device("cpu"))
    peak_s = 2 * m * k * n / times["peak"]
    return {
        "percent of peak, plain": 100 * peak_s / times["plain"],
        "percent of peak, packed": 100 * peak_s / times["packed"],
        "percent of peak, torch.mm": 100 * peak_s / times["torch.mm"],
        "over torch.mm, plain": times["torch.mm"] / times["plain"],
        "over torch.mm, packed": times["torch.mm"] / times["packed"],
    }
