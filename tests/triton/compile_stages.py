"""Compiles the Triton kernels of lora_linear for GPUs that need not be there; prints one JSON line
per kernel. Runs as its own process, without TRITON_INTERPRET: see test_compile_only.py.

    python compile_stages.py ARCHITECTURES ALIGNMENTS PRECISIONS RANKS

Each argument is a comma-separated list, e.g. ``80,90 aligned bf16-bf16,fp32-fp32 16,128``. What is
compiled is what the launchers launch: they run on tensors without data, their launches are
recorded, and Triton's rules for specialising arguments are applied to those.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

import pyfastft.ops  # noqa: F401  the operators, before their implementations
from pyfastft.triton_kernels._plan import Device
from pyfastft.triton_kernels.lora import _stages

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
# M, N, K: sizes that are multiples of 16, sizes that are multiples of nothing, sizes of which
# dropout can serve 8 elements at a time and Triton cannot know the alignment.
ALIGNMENTS = {"aligned": (4096, 2048, 1024), "odd": (4095, 2047, 1023), "eight": (4095, 2056, 1032)}
MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma", "tcgen05.mma")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Recorder:
    """Stands in for a kernel and records how it is launched."""

    def __init__(self, kernel: triton.JITFunction, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.launches.append((self.kernel, arguments, options))

        return launch


def record_launches(m: int, n: int, k: int, r: int, base: str, adapter: str) -> list:
    """The launches of all stages, with dropout and without."""
    kernels = {name: value for name, value in vars(_stages).items() if name.endswith("_kernel")}
    launches: list = []
    for name, kernel in kernels.items():
        setattr(_stages, name, Recorder(kernel, launches))

    def wide(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[base], device="meta")

    def thin(*shape: int, dtype: torch.dtype = DTYPES[adapter]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y, a, b, xa = wide(m, k), wide(m, n), thin(r, k), thin(n, r), thin(m, r)
    t, scaling = thin(m, r, dtype=torch.float32), thin(1, dtype=torch.float32)
    stages = _stages.TritonStages(Device(multiprocessors=132, capability=(9, 0)))
    stages.up(y=y, xa=xa, lora_b=b, scaling=scaling)
    for outputs in ((b, scaling), (None, None)):
        db, ds = outputs
        stages.up_grad(t=t, dlora_b=db, dscaling=ds, grad=y, xa=xa, lora_b=b, scaling=scaling)
    for rng, threshold in ((None, 0), (thin(2, dtype=torch.int64), 6554)):
        stages.down(xa=xa, x=x, lora_a=a, rng=rng, threshold=threshold)
        stages.down_grad(dlora_a=a, t=t, x=x, scaling=scaling, rng=rng, threshold=threshold)
        stages.dx(dx=x, t=t, lora_a=a, scaling=scaling, rng=rng, threshold=threshold)
    for name, kernel in kernels.items():
        setattr(_stages, name, kernel)
    return launches


def specialise(kernel: triton.JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """The source that a launch compiles: Triton makes constants of 1 and None, and notes which
    integers and addresses are multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        varying = parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and not varying
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (
            isinstance(value, int) and value % 16 == 0 and not varying
        ):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}


def main(architectures: str, alignments: str, precisions: str, ranks: str) -> None:
    cases = itertools.product(
        *(argument.split(",") for argument in (alignments, precisions, ranks))
    )
    seen = set()
    for alignment, precision, rank in cases:
        base, adapter = precision.split("-")
        for kernel, arguments, options in record_launches(
            *ALIGNMENTS[alignment], int(rank), base, adapter
        ):
            source = specialise(kernel, arguments)
            for architecture in map(int, architectures.split(",")):
                key = (source.hash(), architecture, *options.values())
                if key in seen:
                    continue
                seen.add(key)
                compiled = compile_source(
                    source, target=GPUTarget("cuda", architecture, 32), options=options
                )
                flags = ("DROPOUT", "GROUPED", "WITH_T")
                row = {
                    "kernel": kernel.__name__,
                    "architecture": architecture,
                    "alignment": alignment,
                    "precision": precision,
                    "rank": int(rank),
                    "flags": [name for name in flags if arguments.get(name)],
                    "half": arguments.get("DOT") is not None and adapter != "fp32",
                    "shared": compiled.metadata.shared,
                    "matrix": [i for i in MATRIX_INSTRUCTIONS if i in compiled.asm["ptx"]],
                    **resource_usage(compiled.asm["cubin"]),
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
