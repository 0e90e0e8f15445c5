"""Compiles the Triton kernels of the masked family for GPUs that need not be there; prints one JSON
line per kernel. Runs as its own process, as ``compile_stages.py`` does.

    python compile_masked.py ARCHITECTURES ALIGNMENTS DTYPES KERNELS

KERNELS are ``every`` or ``some``, one launch of each kernel.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
import triton
from compile_stages import (
    ALIGNMENTS,
    DTYPES,
    MATRIX_INSTRUCTIONS,
    Recorder,
    resource_usage,
    specialise,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import compile as compile_source

import pyfastft.ops  # noqa: F401  the operators, before their implementations
from pyfastft.ops.masked.select import PAIRED, SCORES
from pyfastft.triton_kernels._plan import Device
from pyfastft.triton_kernels.masked import entries, select, step, weight_grad

MODULES = (entries, select, step, weight_grad)
PRODUCTS = ("_rectangle_grad_kernel", "_element_grad_kernel")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_steps(weight: torch.Tensor, index_dtype: torch.dtype, every: bool) -> None:
    """Masters and none, momentum and none, rectangles and elements, stochastic rounding."""
    n, k = weight.shape
    rng = empty(2, dtype=torch.int64)
    hypers = torch.ones(1, 7, dtype=torch.float64)
    cases = [(1, 1, True, None), (1, k, False, rng)]
    if every:
        cases += [(1, 1, False, rng), (1, 1, True, rng), (n, 1, True, None)]
    for rows, columns, masters, random in cases:
        index = empty(1000, dtype=index_dtype)
        stream, none = empty(1000 * rows * columns), empty(0)
        values = stream if masters else none
        common = ([stream], [index], [rows], [columns], hypers, random)
        step._launcher("masked_adamw_", 2)([weight], [values], [stream], [stream], *common)
        if every and random is None:
            step._launcher("masked_lion_", 1)([weight], [values], [stream], *common)
            for buffer in (stream, none):
                step._launcher("masked_sgd_", 1)([weight], [values], [buffer], *common)


def run_all(m: int, n: int, k: int, dtype: torch.dtype, every: bool) -> None:
    """Every launch of these sizes, or one of each kernel."""
    weight, x, grad = empty(n, k, dtype=dtype), empty(m, k, dtype=dtype), empty(m, n, dtype=dtype)
    # Wide offsets where nothing is aligned, narrow ones where everything is.
    for index_dtype in (torch.int64,) if k % 16 else (torch.int32,):
        index = empty(1000, dtype=index_dtype)
        for rows, columns in ((1, 1), (1, k)) if every else ((1, 1),):
            size = 1000 * rows * columns
            entries.masked_gather(empty(size, dtype=dtype), weight, index, rows, columns)
            for values_dtype, alpha in ((dtype, None), (torch.float32, 0.5)):
                values = empty(size, dtype=values_dtype)
                entries.masked_scatter_(weight, values, index, rows, columns, alpha)
        places = empty(500, dtype=torch.int64)
        with_places = (empty(1500, dtype=index_dtype), empty(1500, dtype=torch.int64))
        entries.merge(*with_places, index, places, index)
        run_steps(weight, index_dtype, every)
        # One multiprocessor is filled by the tiles; a thousand are not.
        for multiprocessors in (1, 1000):
            weight_grad.device_of = lambda tensor, count=multiprocessors: Device(count, (9, 0))
            for count, rows, columns in (
                (n * k // 1000, 1, 1),
                (n * k // 10, 1, 1),
                (10, 1, k),
                (10, n, 1),
                (10, 64, 64),
                (10, 89, 31),
            ):
                index = empty(count, dtype=index_dtype)
                values = empty(count * rows * columns)
                if rows == 64 and (n % 64 or k % 64):
                    continue
                weight_grad.masked_weight_grad(values, grad, x, index, rows, columns)
    rng = empty(2, dtype=torch.int64)
    for score in SCORES if every else SCORES[:1]:
        others = [weight] if score in PAIRED else [empty(k)] if score == "wanda" else []
        for largest in (True, False) if every and score == "magnitude" else (True,):
            excluded = [empty(10, dtype=torch.int64)]
            outputs = (empty(1000, dtype=torch.int64), empty(1, dtype=torch.int64))
            select.select_topk(*outputs, [weight], others, excluded, 1000, score, largest, rng)


def record(launches: list) -> None:
    """Replace every kernel by what records its launches; offsets without data cannot be read."""
    for module in MODULES:
        module.expect_index = lambda *args: None
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                setattr(module, name, Recorder(value, launches))


def main(architectures: str, alignments: str, dtypes: str, kernels: str) -> None:
    launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    record(launches)
    for alignment, dtype in itertools.product(alignments.split(","), dtypes.split(",")):
        run_all(*ALIGNMENTS[alignment], DTYPES[dtype], kernels == "every")
    seen = set()
    for kernel, arguments, options in launches:
        source = specialise(kernel, arguments)
        for architecture in map(int, architectures.split(",")):
            key = (source.hash(), architecture, *options.values())
            if key in seen:
                continue
            seen.add(key)
            compiled = compile_source(
                source, target=GPUTarget("cuda", architecture, 32), options=options
            )
            half = arguments.get("a_ptr", arguments.get("grad_ptr"))
            row = {
                "kernel": kernel.__name__,
                "architecture": architecture,
                "tiles": [arguments.get(f"BLOCK_{side}") for side in "MLCNKE"],
                "way": arguments.get("WAY", arguments.get("METHOD", arguments.get("SCORE"))),
                "half": kernel.__name__ in PRODUCTS and half.dtype is not torch.float32,
                "shared": compiled.metadata.shared,
                "matrix": [i for i in MATRIX_INSTRUCTIONS if i in compiled.asm["ptx"]],
                **resource_usage(compiled.asm["cubin"]),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
