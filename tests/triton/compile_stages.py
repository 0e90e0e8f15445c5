"""Compiles the Triton kernels for GPUs that need not be there; prints one JSON line per kernel.
Runs as its own process, without TRITON_INTERPRET: see test_compile_only.py.

    python compile_stages.py ARCHITECTURES ALIGNMENTS PRECISIONS RANKS KERNELS

Each argument is a comma-separated list, e.g. ``80,90 aligned bf16-bf16,fp32-fp32 16,128 stages``;
KERNELS are ``stages``, ``products`` with all tiles that they may have, ``product`` with the first
of them, ``methods``, of the ops beside lora_linear, or of 4-bit weights, for which the ranks stand
for the size of a group, ``int4``, ``int4-narrow`` with the tiles that fit sm_80, or ``int4-first``,
and the same of dX, ``int4-dx``.
What is compiled is what the launchers launch: they run on tensors without data, their launches are
recorded, and Triton's rules for specialising arguments are applied to those.
"""

from __future__ import annotations

import functools
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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source
from triton.tools.tensor_descriptor import TensorDescriptor

import pyfastft.ops  # noqa: F401  the operators, before their implementations
from pyfastft.native._torch_gemm_lists import Masks
from pyfastft.native._torch_int4 import LowRank, Weight
from pyfastft.triton_kernels import _engine, _int4_engine
from pyfastft.triton_kernels._plan import Device
from pyfastft.triton_kernels.lora import _fused, _stages, abs_row_sums, dora, projections
from pyfastft.triton_kernels.ptq4 import _gradient, _kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
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


class Operands:
    """Operands without data, of one size and precision."""

    def __init__(self, size: tuple[int, int, int], r: int, precision: str) -> None:
        (m, n, k), (base, adapter) = size, precision.split("-")

        def empty(*shape: int, dtype: str) -> torch.Tensor:
            return torch.empty(shape, dtype=DTYPES[dtype], device="meta")

        self.x, self.y = empty(m, k, dtype=base), empty(m, n, dtype=base)
        self.weight, self.bias = empty(n, k, dtype=base), empty(n, dtype=base)
        self.a, self.b = empty(r, k, dtype=adapter), empty(n, r, dtype=adapter)
        self.xa, self.gate = empty(m, r, dtype=adapter), empty(1, r, dtype=adapter)
        self.t, self.scaling = empty(m, r, dtype="fp32"), empty(1, dtype="fp32")
        self.rng = torch.empty(2, dtype=torch.int64, device="meta")
        self.size, self.rank = size, r


def run_stages(o: Operands) -> None:
    """Every stage, with dropout and without."""
    stages = _stages.TritonStages(Device(multiprocessors=132, capability=(9, 0)))
    stages.up(y=o.y, xa=o.xa, lora_b=o.b, scaling=o.scaling)
    common = {"grad": o.y, "xa": o.xa, "lora_b": o.b, "scaling": o.scaling}
    for db, ds in ((o.b, o.scaling), (None, None)):
        stages.up_grad(t=o.t, dlora_b=db, dscaling=ds, **common)
    for rng, threshold in ((None, 0), (o.rng, 6554)):
        drop = {"rng": rng, "threshold": threshold}
        stages.down(xa=o.xa, x=o.x, lora_a=o.a, **drop)
        stages.down_grad(dlora_a=o.a, t=o.t, x=o.x, scaling=o.scaling, **drop)
        stages.dx(dx=o.x, t=o.t, lora_a=o.a, scaling=o.scaling, **drop)


def run_products(o: Operands, *, every: bool) -> None:
    """The fused products with every tile that they may have, or with the first."""
    m, n, k = o.size

    def tiles(engine: str, direction: str, rows: int, dropout: bool) -> tuple[_engine.Tiles, ...]:
        names = (str(one.dtype).removeprefix("torch.") for one in (o.x, o.a))
        aligned = n % 16 == 0 and k % 16 == 0
        problem = _engine.Problem(direction, rows, n, k, o.rank, *names, dropout, aligned)
        if _engine.why_not(engine, problem):
            return ()
        found = _engine.candidates(engine, problem)
        return found if every else found[:1]

    base = {"weight": o.weight, "scaling": o.scaling}
    for one in tiles("fused", "forward", m, False):
        _fused.base_up(y=o.y, x=o.x, bias=o.bias, u=o.xa, lora_b=o.b, tiles=one, **base)
    for rng, threshold in ((None, 0), (o.rng, 6554)):
        drop = {"rng": rng, "threshold": threshold}
        for one in tiles("fused", "backward", m, rng is not None):
            _fused.base_dx(dx=o.x, grad=o.y, t=o.t, lora_a=o.a, tiles=one, **drop, **base)
    # One processor is filled by the column tiles, so that K is not cut; a thousand are not.
    for multiprocessors, rows in itertools.product((1, 1000), (16, 32, 64) if every else (16,)):
        _fused.device_of = lambda tensor, count=multiprocessors: Device(count, (9, 0))
        few = {"y": o.y[:rows], "xa": o.xa[:rows], "x": o.x[:rows]}
        adapter = {"lora_a": o.a, "lora_b": o.b, "bias": o.bias, "gate": o.gate}
        for one in tiles("decode", "forward", rows, False):
            _fused.decode(**few, **adapter, tiles=one, **base)


def run_methods(o: Operands) -> None:
    """dX of three projections, DoRA's norm and scales, and the sums of |U V^T - W|."""
    device = Device(multiprocessors=132, capability=(9, 0))
    three = {"ts": [o.t] * 3, "lora_a": [o.a] * 3, "scaling": [o.scaling] * 3}
    masks = Masks([0.1] * 3, o.rng)
    projections.ProjectionStages(device).dx_of_all(dx=o.x, **three, masks=masks)
    numbers = torch.empty(o.size[1], device="meta")
    for squared in (None, numbers):
        dora.row_norms(device, numbers, o.weight, o.a, o.b, o.scaling, squared)
    dora.row_norms(device, numbers, o.weight.T.contiguous().T, o.a, o.b, o.scaling, None)
    dora.scaled(o.y, o.y, numbers, None)
    dora.scaled(o.y, o.y, numbers, o.bias)
    for dx, dscale, dbias in ((o.y, numbers, o.bias), (o.y, None, None), (None, numbers, None)):
        dora.scaled_backward(device, dx, dscale, dbias, o.y, o.y, numbers)
    if o.a.dtype is not o.weight.dtype:
        return
    v = o.a.T
    for w in (None, o.weight):
        abs_row_sums.row_sums(device, numbers, o.b, v, w)
        operands = (numbers, o.b, v, w)
        abs_row_sums.factor_gradient(device, o.b, w, *operands, grad_of_rows=True)
        operands = (torch.empty(o.size[1], device="meta"), v, o.b, None if w is None else w.T)
        abs_row_sums.factor_gradient(device, o.a, None, *operands, grad_of_rows=False)


def run_int4(o: Operands, *, every: bool, wide: bool = True) -> None:
    """W from its codes, and products that unpack them; zeros and scales of every kind."""
    (_, _, k), group = o.size, o.rank
    weights = int4_weights(o)
    for weight in weights if every else weights[1::2]:
        _kernels.dequantize(o.weight, weight)
        _kernels.dequantize(o.weight[:, :64], weight, first=64)
        problem = _int4_engine.Problem(
            *(*o.size, group, str(o.x.dtype).removeprefix("torch."), "any"),
            table=weight.table is not None,
            aligned=k % 32 == 0,
        )
        if _int4_engine.why_not("product", problem):
            continue
        tiles = _int4_engine.candidates("product", problem)
        for one in tiles if every else tiles[:1]:
            if one.wide and not wide:
                continue
            # One processor is filled by the tiles of y; a hundred thousand are not.
            for multiprocessors in (1, 100_000):
                _kernels.product(
                    y=o.y,
                    x=o.x,
                    weight=weight,
                    bias=o.bias,
                    tiles=one,
                    multiprocessors=multiprocessors,
                )
    perm = torch.empty(k, dtype=torch.int32, device="meta")
    _kernels.dequantize(o.weight, weights[0], perm=perm)


def run_int4_gradient(o: Operands, *, every: bool, wide: bool = True) -> None:
    """dX from the codes: with a low-rank term of which elements are dropped, by every tile; by the
    first without dropping, without the term, and in parts."""
    weights = int4_weights(o)
    a, t = o.a[:16], o.t[:, :16].contiguous()
    terms = [LowRank(t, a, o.scaling, o.rng, 6554), LowRank(t, a, o.scaling, None, 0)]
    for weight in weights[1:4:2] if every else weights[3:4]:
        problem = _int4_engine.Problem(
            *(*o.size, o.rank, str(o.x.dtype).removeprefix("torch."), "any"),
            table=weight.table is not None,
            aligned=o.size[2] % 32 == 0,
            direction="backward",
        )
        if _int4_engine.why_not("product", problem):
            continue
        tiles = _int4_engine.candidates("product", problem)
        operands = {"dx": o.x, "grad": o.y, "weight": weight}
        for one in tiles if every else tiles[:1]:
            if wide or not one.wide:
                more = {"low_rank": terms[0], "multiprocessors": 1}
                _gradient.input_gradient(**operands, **more, tiles=one)
        for number, term in ((1, terms[1]), (1, None), (100_000, None)):
            more = {"low_rank": term, "multiprocessors": number}
            _gradient.input_gradient(**operands, **more, tiles=tiles[0])


def int4_weights(o: Operands) -> list[Weight]:
    """Zeros and scales of every kind; the rank is the size of a group."""
    (_, n, k), group = o.size, o.rank
    groups = -(-k // group)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    codes, table = empty(n, -(-k // 2), dtype=torch.uint8), empty(16, dtype=torch.float32)
    scales = (empty(n, groups, dtype=torch.float32), empty(n, groups, dtype=torch.bfloat16))
    zeros = (None, empty(n, groups, dtype=torch.uint8), scales[0])
    weights = [Weight(codes, scales[0], zero, None, k, group) for zero in zeros]
    return weights + [Weight(codes, scale, None, table, k, group) for scale in scales]


RUNS = {
    "int4-dx": functools.partial(run_int4_gradient, every=True),
    "int4-dx-narrow": functools.partial(run_int4_gradient, every=True, wide=False),
    "int4-dx-first": functools.partial(run_int4_gradient, every=False),
    "int4": functools.partial(run_int4, every=True),
    "int4-narrow": functools.partial(run_int4, every=True, wide=False),
    "int4-first": functools.partial(run_int4, every=False),
    "methods": run_methods,
    "stages": run_stages,
    "products": functools.partial(run_products, every=True),
    "product": functools.partial(run_products, every=False),
}


def record_launches(operands: Operands, kernels: str) -> list:
    """What one of RUNS launches."""
    launches: list = []
    for module in (_stages, _fused, abs_row_sums, dora, projections, _kernels, _gradient):
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel"):
                kernel = value.kernel if isinstance(value, Recorder) else value
                setattr(module, name, Recorder(kernel, launches))
    RUNS[kernels](operands)
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
        if isinstance(value, TensorDescriptor):
            element = POINTERS[value.base.dtype].removeprefix("*")
            signature[parameter.name] = f"tensordesc<{element}{list(value.block_shape)}>"
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


def multiplies_half(arguments: dict[str, Any]) -> bool:
    """Whether tensor cores have to run: for a half base, a half factor, or one cut into halves."""
    base = arguments.get("w_ptr", arguments.get("w"))
    if "codes_ptr" in arguments:
        base = arguments.get("x_ptr")
    base = getattr(base, "base", base)
    return (
        arguments.get("DOT") in (tl.bfloat16, tl.float16)
        or (base is not None and base.dtype is not torch.float32)
        or arguments.get("PIECES", False)
    )


def main(architectures: str, alignments: str, precisions: str, ranks: str, kernels: str) -> None:
    cases = itertools.product(
        *(argument.split(",") for argument in (alignments, precisions, ranks, kernels))
    )
    seen = set()
    for alignment, precision, rank, which in cases:
        operands = Operands(ALIGNMENTS[alignment], int(rank), precision)
        for kernel, arguments, options in record_launches(operands, which):
            source = specialise(kernel, arguments)
            for architecture in map(int, architectures.split(",")):
                key = (source.hash(), architecture, *options.values())
                # What descriptors take is tuned for none but the architectures that have them.
                if key in seen or (arguments.get("TMA") and architecture < 90):
                    continue
                seen.add(key)
                compiled = compile_source(
                    source, target=GPUTarget("cuda", architecture, 32), options=options
                )
                flags = (
                    "DROPOUT",
                    "GROUPED",
                    "WITH_T",
                    "WHOLE",
                    "TMA",
                    "KNOWN",
                    "WITH_W",
                    "NEED_W",
                    "COMMON_GROUP",
                )
                row = {
                    "kernel": kernel.__name__,
                    "architecture": architecture,
                    "alignment": alignment,
                    "precision": precision,
                    "rank": int(rank),
                    "flags": [name for name in flags if arguments.get(name)],
                    "tiles": [arguments.get(f"BLOCK_{side}") for side in "MCDRNK"],
                    "half": multiplies_half(arguments),
                    "shared": compiled.metadata.shared,
                    "matrix": [i for i in MATRIX_INSTRUCTIONS if i in compiled.asm["ptx"]],
                    **resource_usage(compiled.asm["cubin"]),
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
