"""Compiles the Triton kernels of the prune family for GPUs that need not be there; prints one JSON
line per kernel. Runs as its own process, as ``compile_stages.py`` does.

    python compile_prune.py ARCHITECTURES ALIGNMENTS DTYPES BLOCKS

BLOCKS are sizes such as ``32x32``, or ``every`` for all that the kernels take.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
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
from pyfastft.ops.prune._pattern import grid_of
from pyfastft.triton_kernels import prune
from pyfastft.triton_kernels._plan import Device


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_all(size: tuple[int, int, int], dtype: torch.dtype, block: tuple[int, int]) -> None:
    """Many tokens and one, with a bias and without, tokens cut in parts and not."""
    many, n, k = size
    blocks, grid = 1000, grid_of(n, k, *block)
    index = empty(3 * blocks + 2 * (sum(grid) + 1), dtype=torch.int32)
    values, bias = empty(blocks, *block, dtype=dtype), empty(n, dtype=dtype)
    for m in (many, 1):
        x, y = empty(m, k, dtype=dtype), empty(m, n, dtype=dtype)
        prune.product(y, x, values, bias, index, grid, transposed=False)
        prune.product(x, y, values, None, index, grid, transposed=True)
    x, y = empty(many, k, dtype=dtype), empty(many, n, dtype=dtype)
    for multiprocessors in (1, 100_000):
        prune.device_of = lambda tensor, count=multiprocessors: Device(count, (9, 0))
        prune.gradient(values, y, x, index, grid)


def main(architectures: str, alignments: str, dtypes: str, blocks: str) -> None:
    launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    for name in ("_block_product_kernel", "_block_grad_kernel"):
        setattr(prune, name, Recorder(getattr(prune, name), launches))
    sizes = list(itertools.product(prune.EDGES, prune.EDGES))
    if blocks != "every":
        sizes = [tuple(map(int, one.split("x"))) for one in blocks.split(",")]
    for alignment, dtype in itertools.product(alignments.split(","), dtypes.split(",")):
        for size in sizes:
            run_all(ALIGNMENTS[alignment], DTYPES[dtype], size)
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
            row = {
                "kernel": kernel.__name__,
                "architecture": architecture,
                "tiles": [arguments.get(f"BLOCK_{side}") for side in "MLD"],
                "transposed": arguments.get("blocks_ptr") is not None,
                "warps": options["num_warps"],
                "half": arguments["x_ptr"].dtype is not torch.float32,
                "shared": compiled.metadata.shared,
                "matrix": [i for i in MATRIX_INSTRUCTIONS if i in compiled.asm["ptx"]],
                **resource_usage(compiled.asm["cubin"]),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
