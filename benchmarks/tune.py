"""``make gpu-tune FAMILY=lora``: measure the engines of an op beside each other on this GPU, and
write down which one each problem runs best on; ``make cpu-tune`` the same of lora's on this CPU.

    python -m pyfastft.benchmarks.tune --family lora --device cuda

Every engine that can compute a problem, with every tile it may have, is held to the float64
reference, then all take turns. The tables are read by ``triton_kernels/_engine.py``,
``_int4_engine.py`` and ``native/_cpu_engine.py``; rows of other devices stay as they are. Commit
them: from then on users of this device get what was measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from pyfastft._op import REGISTRY, Op, backend
from pyfastft.benchmarks import machine
from pyfastft.benchmarks.measure import operand_sets
from pyfastft.benchmarks.timer import (
    Candidate,
    Clock,
    CudaClock,
    WallClock,
    interleave,
    summarise,
)
from pyfastft.native import _cpu_engine, _torch_gemm
from pyfastft.testing.samples import upcast
from pyfastft.testing.tolerance import assert_accurate
from pyfastft.triton_kernels import _engine, _int4_engine
from pyfastft.triton_kernels._common import device_of

Problem = _engine.Problem | _int4_engine.Problem | _cpu_engine.Problem
Tiles = _engine.Tiles | _int4_engine.Tiles

# An engine other than the first, the usual one, has to be faster by this share: a tie is not worth
# a kernel, nor bits that depend on the number of threads.
MARGIN = 0.02
_P = 0.1
_ENGINES: dict[type, ModuleType] = {
    _engine.Problem: _engine,
    _int4_engine.Problem: _int4_engine,
    _cpu_engine.Problem: _cpu_engine,
}

_TOKENS = (1, 4, 16, 64, 512, 2048, 8192)
_LAYERS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
_DTYPES = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
_INT4_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
# Dtype, size of a group, zero-points, whether the codes are those of a table.
_INT4_FORMATS = (
    ("bfloat16", 128, "none", False),
    ("bfloat16", 128, "uint8", False),
    ("bfloat16", 64, "none", False),
    ("bfloat16", 64, "uint8", False),
    ("bfloat16", 64, "float", False),
    ("bfloat16", 32, "none", False),
    ("bfloat16", 64, "none", True),
    ("float16", 128, "none", False),
    ("float16", 128, "uint8", False),
)
_INT4_RANK = 16
_INT4_GRADIENT_TOKENS = (16, 64, 256, 1024, 4096)
# The dtype of a low-rank term's A, and whether it drops elements.
_INT4_TERMS = (("", False), ("float32", True), ("bfloat16", True))
_CPU_TOKENS = (1, 4, 16, 64, 512, 2048)
_CPU_LAYERS = ((1536, 384), (384, 1536), (1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096))
_CPU_RANK = 16
# By family and device. Each speaks for sizes up to twice and down to half its own, so these cover
# what lies between.
PROBLEMS: dict[tuple[str, str], tuple[Problem, ...]] = {
    ("lora", "cuda"): tuple(
        _engine.Problem(direction, m, n, k, r, dtype, adapter, dropout, aligned=True)
        for (dtype, adapter), direction, dropout, (n, k), m, r in itertools.product(
            _DTYPES, ("forward", "backward"), (False, True), _LAYERS, _TOKENS, (16, 64)
        )
    ),
    ("lora", "cpu"): tuple(
        _cpu_engine.Problem(direction, m, n, k, dtype, torch.get_num_threads())
        for dtype, (n, k), m, direction in itertools.product(
            ("float32", "bfloat16"), _CPU_LAYERS, _CPU_TOKENS, ("forward", "backward")
        )
    ),
    ("ptq4", "cuda"): tuple(
        _int4_engine.Problem(m, n, k, group, dtype, zero, table, aligned=True)
        for (dtype, group, zero, table), (n, k), m in itertools.product(
            _INT4_FORMATS, _LAYERS, _INT4_TOKENS
        )
    )
    + tuple(
        _int4_engine.Problem(
            *(m, n, k, group, dtype, zero, table),
            aligned=True,
            direction="backward",
            adapter=adapter,
            dropout=dropout,
        )
        for (dtype, group, zero, table), (adapter, dropout), (n, k), m in itertools.product(
            _INT4_FORMATS[:7], _INT4_TERMS, _LAYERS, _INT4_GRADIENT_TOKENS
        )
    ),
}
TABLES = {
    ("lora", "cuda"): _engine.TABLE,
    ("lora", "cpu"): _cpu_engine.TABLE,
    ("ptq4", "cuda"): _int4_engine.TABLE,
}


def _op_of(problem: Problem) -> Op:
    name = "lora_linear"
    if isinstance(problem, _int4_engine.Problem):
        name = "int4_lora_linear" if problem.adapter else "int4_linear"
    return REGISTRY[name + ("_backward" if problem.direction == "backward" else "")]


def arguments(problem: Problem, device: torch.device) -> tuple[Any, ...]:
    """Random arguments of the op that computes a problem; the base is frozen."""
    if isinstance(problem, _int4_engine.Problem):
        return _int4_arguments(problem, device)
    m, n, k = problem.m, problem.n, problem.k
    dtype = adapter = getattr(torch, problem.dtype)
    r, dropout = _CPU_RANK, False
    if isinstance(problem, _engine.Problem):
        r, dropout, adapter = problem.r, problem.dropout, getattr(torch, problem.adapter)

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) * std).to(dtype)

    x, weight = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype, std=k**-0.5)
    a, b = normal(r, k, dtype=adapter, std=k**-0.5), normal(n, r, dtype=adapter, std=r**-0.5)
    scaling = torch.full((), 2.0, device=device)
    p = _P if dropout else 0.0
    rng = torch.tensor([1, 2], device=device)
    if problem.direction == "forward":
        return x, weight, a, b, None, scaling, p, rng, None, None, None
    xa, grad = normal(m, r, dtype=adapter), normal(m, n, dtype=dtype)
    need = [True, False, True, True, False, False, False]
    return grad, x, weight, a, b, xa, scaling, p, rng, None, None, None, need


def _int4_arguments(problem: _int4_engine.Problem, device: torch.device) -> tuple[Any, ...]:
    m, n, k, group = problem.m, problem.n, problem.k, problem.group_size
    groups = -(-k // group)
    codes = torch.randint(256, (n, -(-k // 2)), dtype=torch.uint8, device=device)
    scale = torch.randn(n, groups, device=device) * (0.25 * k**-0.5)
    zero = None
    if problem.zero == "uint8":
        zero = torch.randint(16, (n, groups), dtype=torch.uint8, device=device)
    elif problem.zero == "float":
        zero = 7.5 + torch.randn(n, groups, device=device)
    format = (group, "nf4" if problem.table else "int4")
    lead = torch.randn(m, k if problem.direction == "forward" else n, device=device)
    lead = lead.to(getattr(torch, problem.dtype))
    if problem.direction == "forward":
        return lead, codes, scale, zero, None, None, None, *format
    if not problem.adapter:
        return lead, None, codes, scale, zero, None, None, k, *format, [True, False, False, False]
    adapter = getattr(torch, problem.adapter)
    a = (torch.randn(_INT4_RANK, k, device=device) * k**-0.5).to(adapter)
    b = (torch.randn(n, _INT4_RANK, device=device) * _INT4_RANK**-0.5).to(adapter)
    p, rng = (_P, torch.tensor([1, 2], device=device)) if problem.dropout else (0.0, None)
    operands = (lead, None, codes, scale, zero, a, b, None, torch.full((), 2.0, device=device))
    return *operands, p, rng, None, None, *format, [True] + [False] * 6


def contenders(
    problem: Problem, capability: tuple[int, int]
) -> dict[str, tuple[str, Tiles | None]]:
    """Engines and tiles that can compute a problem on a device of that compute capability, by the
    name under which a row has their time; the usual engine first."""
    engines = _ENGINES[type(problem)]
    found: dict[str, tuple[str, Tiles | None]] = {}
    for engine in engines.ENGINES:
        if engines.why_not(engine, problem) is None:
            for tiles in engines.candidates(engine, problem) or (None,):
                if tiles is None:
                    found[engine] = (engine, None)
                    continue
                *sizes, recent = vars(tiles).values()
                if not recent or capability >= _engine.TMA_SINCE:
                    name = "x".join(map(str, sizes))
                    name += f" {list(vars(tiles))[-1]}" if recent else ""
                    found[f"{engine} {name}"] = (engine, tiles)
    return found


def hold(problem: Problem, args: tuple[Any, ...]) -> None:
    """Hold the engine that is forced to the float64 reference.

    Raises:
        AssertionError: an output is not accurate.
    """
    op = _op_of(problem)
    actual = op(*args)
    with backend("reference"):
        truth, naive = op(*upcast(args)), op(*args)
    gradient = op.name.endswith("_backward")
    outputs = zip(*(_several(one) for one in (actual, truth, naive)), strict=True)
    for i, (a, t, n) in enumerate(outputs):
        assert_accurate(a, t, n, gradient=gradient, what=f"output {i}")


def _several(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def tune(
    problem: Problem, device: torch.device, *, clock: Clock, budget_s: float
) -> tuple[dict[str, Any], list[str]]:
    """The row of the table for one problem, and what was left out of the run and why.

    Args:
        problem: what is measured: the whole op, with every engine and tile that it may have.
        device: where.
        clock: how a span is timed.
        budget_s: about how long the rounds may take.
    """
    torch.manual_seed(0)
    op, engines = _op_of(problem), _ENGINES[type(problem)]
    first = arguments(problem, device)
    footprint = sum(a.nbytes for a in first if isinstance(a, torch.Tensor))
    sets = [first]
    sets += [arguments(problem, device) for _ in range(operand_sets(footprint, device) - 1)]
    running: dict[str, Candidate] = {}
    left_out = []
    on_cpu = isinstance(problem, _cpu_engine.Problem)
    entrants = contenders(problem, (0, 0) if on_cpu else device_of(first[0]).capability)
    for name, (engine, tiles) in entrants.items():

        def step(args: tuple[Any, ...], engine: str = engine, tiles: Tiles | None = tiles) -> None:
            with engines.forced(engine, tiles):
                op(*args)

        try:
            with engines.forced(engine, tiles):
                if not str(op.explain(*first).engine).startswith(engine):
                    continue  # another backend's
                hold(problem, first)
        except AssertionError as error:
            left_out.append(f"{problem}: {name}: not accurate: {error}")
            continue
        running[name] = Candidate([lambda s=step, args=args: s(args) for args in sets])
    times = interleave(running, clock=clock, budget_s=budget_s)
    medians = {name: summarise(samples).median for name, samples in times.items()}
    usual = engines.ENGINES[0]
    best = min(medians, key=medians.__getitem__, default=usual)
    if usual in medians and medians[best] > (1 - MARGIN) * medians[usual]:
        best = usual
    engine, tiles = entrants[best]
    row = {
        **_sizes(problem),
        "engine": engine,
        "tiles": None if tiles is None else list(vars(tiles).values()),
        "us": {name: float(f"{1e6 * spent:.4g}") for name, spent in medians.items()},
    }
    return row, left_out


def _sizes(problem: Problem) -> dict[str, Any]:
    engines = _ENGINES[type(problem)]
    return {name: getattr(problem, name) for name in (*engines.SAME, *engines.NEAR)}


def write(rows: Sequence[dict[str, Any]], device: str, path: Path) -> None:
    """Put the rows of a device into the table, one per line."""
    table = json.loads(path.read_text()) if path.is_file() else {}
    table[device] = {"provenance": machine.provenance(), "rows": list(rows)}
    devices = []
    for name, measured in sorted(table.items()):
        lines = ",\n".join(f"   {json.dumps(one)}" for one in measured["rows"])
        head = f'  "provenance": {json.dumps(measured["provenance"])},\n  "rows": ['
        devices.append(f" {json.dumps(name)}: {{\n{head}\n{lines}\n  ]\n }}")
    path.write_text("{\n" + ",\n".join(devices) + "\n}\n")


def run(
    problems: Sequence[Problem],
    device: torch.device,
    *,
    clock: Clock,
    budget_s: float,
    output: Path,
    progress: bool = False,
) -> list[str]:
    """Tune every problem and write the table after each; what was left out and why.

    A run that was interrupted resumes: what the table has from this revision is not measured again.
    """
    of_cpu = isinstance(problems[0], _cpu_engine.Problem)
    name = _cpu_engine.cpu_name() if of_cpu else _torch_gemm.device_name(device)
    before = json.loads(output.read_text()).get(name) if output.is_file() else None
    same = before is not None and before["provenance"]["git_sha"] == machine.revision()["git_sha"]
    rows = list(before["rows"]) if before is not None and same else []
    left_out = []
    for problem in tqdm(problems, desc=name, disable=not progress):
        if any(all(row[key] == value for key, value in _sizes(problem).items()) for row in rows):
            continue
        row, absent = tune(problem, device, clock=clock, budget_s=budget_s)
        rows.append(row)
        left_out += absent
        write(rows, name, output)
    return left_out


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit code 2 without the device, 1 where something was not accurate."""
    parser = argparse.ArgumentParser(prog="pyfastft.benchmarks.tune", description=__doc__)
    parser.add_argument("--family", choices=("lora", "ptq4"), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of rounds per problem")
    parser.add_argument("--output", type=Path, help="the table to write, if not the family's")
    args = parser.parse_args(argv)
    of = args.family, args.device
    if of not in PROBLEMS:
        print(f"tune: {args.family} has one engine on {args.device}", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("tune: torch sees no CUDA device", file=sys.stderr)
        return 2
    output = args.output or TABLES[of]
    left_out = run(
        PROBLEMS[of],
        torch.device(args.device),
        clock=CudaClock() if args.device == "cuda" else WallClock(),
        budget_s=args.budget,
        output=output,
        progress=sys.stderr.isatty(),
    )
    for line in left_out:
        print(f"left out: {line}")
    print(f"wrote {output}")
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
