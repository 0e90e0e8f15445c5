"""Which engine computes lora_linear on a GPU: a pure function of the problem, the device, and what
has been measured on it.

    gemm     torch's GEMM with the small kernels of a backend around it
    fused    the base product with the low-rank term in its accumulator, in Triton
    decode   the whole forward of a few tokens without dropout, in Triton

``_engine.json`` holds the measurements, written by ``make gpu-tune FAMILY=lora``. Where it knows
nothing near a problem, gemm runs: a fused product that is a tenth slower than cuBLAS's loses more
than fusing gains, so it takes a measurement to be picked.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyfastft._random import GROUP
from pyfastft.triton_kernels import _measured
from pyfastft.triton_kernels._plan import MASKED_TILE

ENGINES = ("gemm", "fused", "decode")
TABLE = Path(__file__).with_name("_engine.json")


@dataclass(frozen=True)
class Problem:
    """One direction of lora_linear. Dtypes by their names; ``dropout`` where elements are dropped.

    ``aligned`` says that every size and stride along rows is a multiple of 16 elements: Triton
    knows nothing else of them, and without it loads each element by itself.
    """

    direction: str  # "forward" or "backward"
    m: int
    n: int
    k: int
    r: int
    dtype: str
    adapter: str
    dropout: bool
    aligned: bool


@dataclass(frozen=True)
class Tiles:
    """Of a product (M, D) (D, C): tile sizes along those, how the kernel is launched, and whether
    its operands come through tensor descriptors (TMA on sm_90 and later) or through pointers."""

    block_m: int
    block_c: int
    block_d: int
    num_warps: int
    num_stages: int
    tma: bool = False


@dataclass(frozen=True)
class Choice:
    """An engine, the reason for it, and its tiles where it has any."""

    engine: str
    why: str
    tiles: Tiles | None = None


# What may be launched, by the kind of product; the first where no measurement says otherwise. The
# tests compile every one for sm_80, sm_90 and sm_100: whatever spilled on one of them is not here.
#
# half: tensor cores multiply everything. mixed: float32 factors beside a half base take part as
# bfloat16 pieces, which are made in registers. float32: FMA units, whose operands stand in
# registers. With dropout the mask stands in registers, too. Descriptors spare the registers that
# addresses and masks of the loads take, on sm_90 and later; on sm_80 they are pointers again, and
# are neither tuned nor compiled for it.
FUSED_TILES: dict[tuple[str, bool], tuple[Tiles, ...]] = {
    ("half", False): (
        Tiles(128, 256, 64, 8, 3),
        Tiles(128, 128, 64, 8, 4),
        Tiles(64, 256, 64, 8, 3),
        Tiles(64, 128, 64, 4, 4),
        Tiles(128, 256, 64, 8, 3, tma=True),
        Tiles(128, 256, 64, 8, 4, tma=True),
        Tiles(128, 128, 64, 8, 4, tma=True),
    ),
    ("half", True): (
        Tiles(128, 128, 64, 8, 4),
        Tiles(64, 256, 64, 8, 3),
        Tiles(64, 128, 64, 4, 4),
        Tiles(128, 256, 64, 8, 3, tma=True),
        Tiles(128, 128, 64, 8, 4, tma=True),
    ),
    ("mixed", False): (
        Tiles(128, 128, 64, 8, 4),
        Tiles(64, 128, 64, 8, 4),
        Tiles(128, 256, 64, 8, 3, tma=True),
        Tiles(128, 128, 64, 8, 4, tma=True),
    ),
    ("mixed", True): (
        Tiles(128, 128, 64, 8, 4),
        Tiles(64, 128, 64, 8, 4),
        Tiles(128, 256, 64, 8, 3, tma=True),
        Tiles(128, 128, 64, 8, 4, tma=True),
    ),
    ("float32", False): (Tiles(128, 64, 16, 8, 2), Tiles(64, 64, 16, 8, 2)),
    ("float32", True): (Tiles(128, 64, 16, 8, 2), Tiles(64, 64, 16, 8, 2)),
}
# Where Triton loads each element by itself, and where each element draws its own random number.
UNALIGNED_TILES = Tiles(32, 64, 16, 4, 2)
MASKED_TILES = Tiles(*MASKED_TILE, 32, 4, 2)
# A higher rank goes through in several steps: 64 at once spilled on sm_80.
FUSED_RANKS = (16, 32)
TMA_SINCE = (9, 0)

# decode is bound by reading W once: what counts is how much of it is on its way at a time. block_m
# is the smallest of DECODE_ROWS that holds the rows, and one tile of ranks holds the rank: float32
# factors stand in registers, so fewer of them fit.
DECODE_TILES: dict[str, tuple[Tiles, ...]] = {
    "half": (Tiles(16, 32, 128, 4, 4), Tiles(16, 16, 128, 4, 5)),
    "mixed": (Tiles(16, 32, 64, 8, 4), Tiles(16, 16, 64, 4, 4)),
    "float32": (Tiles(16, 32, 32, 8, 4), Tiles(16, 16, 32, 4, 4)),
}
DECODE_UNALIGNED_TILES = {
    "half": Tiles(16, 32, 32, 4, 2),
    "mixed": Tiles(16, 32, 32, 4, 2),
    "float32": Tiles(16, 32, 32, 8, 2),
}
DECODE_ROWS = {"half": (16, 32, 64), "mixed": (16,), "float32": (16,)}
DECODE_RANKS = {"half": 64, "mixed": 32, "float32": 32}


def kind_of(problem: Problem) -> str:
    """half, mixed or float32: what multiplies what."""
    if problem.dtype == "float32":
        return "float32"
    return "half" if problem.adapter == problem.dtype else "mixed"


def why_not(engine: str, problem: Problem) -> str | None:
    """Why an engine cannot compute a problem, or None where it can."""
    if engine != "decode":
        return None
    if problem.direction != "forward":
        return "decode is a forward"
    if problem.dropout:
        return "decode has no dropout"
    rows, ranks = DECODE_ROWS[kind_of(problem)][-1], DECODE_RANKS[kind_of(problem)]
    if problem.m > rows or problem.r > ranks:
        return f"decode takes at most {rows} rows and {ranks} ranks of these dtypes"
    return None


def candidates(engine: str, problem: Problem) -> tuple[Tiles, ...]:
    """The tiles with which an engine may compute a problem, the default first."""
    kind, dropout = kind_of(problem), problem.direction == "backward" and problem.dropout
    if engine == "fused":
        if dropout and problem.k % GROUP:
            return (MASKED_TILES,)
        return FUSED_TILES[kind, dropout] if problem.aligned else (UNALIGNED_TILES,)
    if engine == "decode":
        rows = next(rows for rows in DECODE_ROWS[kind] if rows >= problem.m)
        tiles = DECODE_TILES[kind] if problem.aligned else (DECODE_UNALIGNED_TILES[kind],)
        return tuple(replace(one, block_m=rows) for one in tiles)
    return ()


def plan(problem: Problem, device: str) -> Choice:
    """The engine for a problem on a device of that name.

    What is forced comes first, where it can compute the problem at all; then the measurement
    nearest to the problem, if there is one within reach; then gemm.
    """
    if _forced is None:
        return settled(device) or _measured_choice(problem, device)
    why = why_not(_forced.engine, problem)
    if why is not None:
        return Choice("gemm", f"{_forced.why}, but {why}")
    tiles = candidates(_forced.engine, problem)
    if _forced.tiles in tiles or not tiles:
        return _forced
    return replace(_forced, tiles=tiles[0])


def settled(device: str) -> Choice | None:
    """What :func:`plan` says of every problem on a device of which nothing is known; else None."""
    return _unmeasured(device) if _forced is None else None


@functools.cache
def _unmeasured(device: str) -> Choice | None:
    if table().get(device, {}).get("rows"):
        return None
    return Choice("gemm", f"nothing has been measured on {device}")


@functools.lru_cache(maxsize=4096)
def _measured_choice(problem: Problem, device: str) -> Choice:
    found = _measured.nearest(table()[device]["rows"], problem, SAME, NEAR)
    if not problem.aligned or found is None:
        return Choice("gemm", f"nothing near has been measured on {device}")
    why = f"measured on {device} at M={found['m']} N={found['n']} K={found['k']} R={found['r']}"
    engine = found["engine"]
    if engine == "gemm" or why_not(engine, problem) is not None:
        return Choice("gemm", why)
    offered = candidates(engine, problem)
    tiles = Tiles(*found["tiles"])
    if engine == "decode":
        tiles = replace(tiles, block_m=offered[0].block_m)
    # Tiles that the kernels no longer come with were measured on other kernels.
    return Choice(engine, why, tiles) if tiles in offered else Choice("gemm", f"{why}, outdated")


def table() -> dict[str, Any]:
    """The committed measurements, by device name."""
    return _measured.read(TABLE)


def forget() -> None:
    """Read the table anew at the next call."""
    for cached in (_measured.read, _unmeasured, _measured_choice):
        cached.cache_clear()


@contextlib.contextmanager
def forced(engine: str, tiles: Tiles | None = None) -> Iterator[None]:
    """Compute with one engine, in the whole process, what it can compute, while this is open.

    Raises:
        ValueError: there is no engine of that name.
    """
    global _forced
    before = _forced
    _forced = _forced_choice(engine, f"{engine} is forced", tiles)
    try:
        yield
    finally:
        _forced = before


def _forced_choice(name: str, why: str, tiles: Tiles | None = None) -> Choice | None:
    if name in ("", "auto"):
        return None
    if name not in ENGINES:
        known = ", ".join(ENGINES)
        raise ValueError(f"PYFASTFT_LORA_ENGINE: expected {known} or auto, got {name!r}")
    return Choice(name, why, tiles)


SAME = ("direction", "dtype", "adapter", "dropout")
NEAR = ("m", "n", "k", "r")
# Process-wide, as a forced backend is, and for its reason.
_forced = _forced_choice(os.environ.get("PYFASTFT_LORA_ENGINE", ""), "PYFASTFT_LORA_ENGINE says so")
