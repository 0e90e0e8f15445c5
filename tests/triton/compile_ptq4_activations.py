"""Compiles the Triton kernels of quantized activations and int8 weights for GPUs that need not be
there; prints one JSON line per kernel. Runs as its own process, as ``compile_stages.py`` does.

    python compile_ptq4_activations.py ARCHITECTURES ALIGNMENTS DTYPES GROUPS KERNELS

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
from pyfastft.triton_kernels._plan import Device
from pyfastft.triton_kernels.lora import _stages
from pyfastft.triton_kernels.ptq4 import _rounded, fake_quantize4, int8_linear

MODULES = (_rounded, fake_quantize4, int8_linear, _stages)
PRODUCTS = ("_int4_bytes_kernel", "_int8_product_kernel", "_int8_scale_gradient_kernel")


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_all(m: int, n: int, k: int, dtype: torch.dtype, group: int, every: bool) -> None:
    """Every launch of these sizes, or one of each kernel."""
    groups = -(-k // group)
    x, y, bias = empty(m, k, dtype=dtype), empty(m, n, dtype=dtype), empty(n, dtype=dtype)
    packed = empty(n, -(-k // 2), dtype=torch.uint8)
    perm = empty(k, dtype=torch.int32)
    one, each = empty(1, dtype=torch.float32), empty(groups, dtype=torch.float32)
    for scale_dtype in (torch.float32, torch.bfloat16) if every else (torch.float32,):
        scale = empty(n, groups, dtype=scale_dtype)
        integers = empty(n, groups, dtype=torch.uint8)
        for rows in (m, 1) if every else (m,):
            operands = (y[:rows], x[:rows], packed, scale)
            _rounded.linear(*operands, None, bias, None, None, group)
            if not every:
                continue
            _rounded.linear(*operands, scale, None, perm, None, group)
            _rounded.linear(*operands, integers, bias, None, (each, each), group)
            _rounded.linear(*operands, integers, None, perm, (one, one), group)
    for ranges, order in (((one, one), None), ((each, each), perm))[: 2 if every else 1]:
        fake_quantize4.fake_quantize4(x, x, *ranges, order, group)
        gradients = (x, *ranges, x, x, *ranges, order, group)
        fake_quantize4.fake_quantize4_backward(*gradients, [True] * 3)
        fake_quantize4.fake_quantize4_backward(*gradients, [True, False, False])
    codes, per_output = empty(n, k, dtype=torch.int8), empty(n, dtype=torch.float32)
    int8_linear.product(y, x, codes, per_output, bias, scaled_depth=False)
    int8_linear.product(x, y, codes.T, per_output, None, scaled_depth=True)
    device = Device(multiprocessors=132, capability=(9, 0))
    int8_linear.scale_gradient(device, per_output, y, x, codes)


def record(launches: list) -> None:
    """Replace every kernel by what records its launches."""
    for module in MODULES:
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                setattr(module, name, Recorder(value, launches))


def main(architectures: str, alignments: str, dtypes: str, groups: str, kernels: str) -> None:
    launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    record(launches)
    for alignment, dtype, group in itertools.product(
        *(argument.split(",") for argument in (alignments, dtypes, groups))
    ):
        run_all(*ALIGNMENTS[alignment], DTYPES[dtype], int(group), kernels == "every")
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
            lead = arguments.get("x_ptr", arguments.get("a_ptr"))
            bytes_of_codes = kernel.__name__ == "_int4_bytes_kernel"
            row = {
                "kernel": kernel.__name__,
                "architecture": architecture,
                "tiles": [arguments.get(f"BLOCK_{side}") for side in "MNKB"],
                "half": kernel.__name__ in PRODUCTS
                and (bytes_of_codes or lead.dtype is not torch.float32),
                "shared": compiled.metadata.shared,
                "matrix": [i for i in MATRIX_INSTRUCTIONS if i in compiled.asm["ptx"]],
                **resource_usage(compiled.asm["cubin"]),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
