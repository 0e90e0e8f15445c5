"""Which engine computes int4_linear on a GPU, and how it is launched: pure functions of the
problem, the device, and what has been measured on it.

    panels     W in panels of bounded size, each for torch's GEMM
    gemv       at most four rows of x straight from the codes, in CUDA
    mma        at most 64 rows straight from the codes on tensor cores, in CUDA
    product    any number of rows straight from the codes, in Triton

panels and product also compute dX, of which the other two know nothing.

``_int4_engine.json`` holds the measurements, written by ``make gpu-tune FAMILY=ptq4``. Where it
knows nothing near a problem, panels run.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyfastft.triton_kernels import _measured

ENGINES = ("panels", "gemv", "mma", "product")
TABLE = Path(__file__).with_name("_int4_engine.json")


@dataclass(frozen=True)
class Problem:
    """A product, forward or dX. Dtypes by their names; ``zero`` is none, uint8 or float.

    ``aligned`` says that rows of x, or dY, and of codes begin at multiples of 16 bytes. ``adapter``
    is the dtype of a low-rank term in dX, which drops elements where ``dropout``; of a forward, and
    where there is no such term, it is empty.
    """

    m: int
    n: int
    k: int
    group_size: int
    dtype: str
    zero: str
    table: bool
    aligned: bool
    direction: str = "forward"  # or "backward"
    adapter: str = ""
    dropout: bool = False


@dataclass(frozen=True)
class Tiles:
    """Of y^T = W x^T or dX = dY W: tile sizes along N, M and K, how the kernel is launched, and
    whether it needs the registers that products leave free on sm_90 and later."""

    block_n: int
    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    wide: bool = False


@dataclass(frozen=True)
class Choice:
    """An engine, the reason for it, and its tiles where it has any."""

    engine: str
    why: str
    tiles: Tiles | None = None


# A panel of W: of a size that stays in L2 between being written and being read, and that is small
# beside any W for which memory matters.
PANEL_BYTES = 16 << 20
PANEL_MULTIPLE = 64

# Of one program of Triton's dequantization; block_k as far as a group of scales goes.
DEQUANTIZE_TILE = Tiles(block_n=16, block_m=0, block_k=128, num_warps=4, num_stages=1)

# Tiles of product, by what multiplies what; the first where no measurement says otherwise. block_k
# is as large as a group, at most: between two groups the sums are scaled.
#
# The tests compile every one for sm_80, sm_90 and sm_100, a wide one not for sm_80: whatever
# spilled there is not here. A product's sums stand in registers twice, of a group and of all;
# beside them 128 deep tiles of W had no room on sm_80 with zero-points (up to 256 bytes of stack),
# nor 128 x 128 anywhere. Numbers of a table are loaded ahead through shared memory, and their
# addresses take registers, too. float32 has its operands in registers: twice as many elements to a
# thread, 64 x 32 here or 32 x 32 of four warps, took all 255 and up to 64 bytes of stack.
PRODUCT_TILES: dict[str, tuple[Tiles, ...]] = {
    "codes": (
        Tiles(128, 64, 64, 8, 3),
        Tiles(64, 128, 64, 8, 3),
        Tiles(64, 64, 64, 4, 3),
        Tiles(64, 32, 64, 4, 4),
        Tiles(128, 128, 64, 8, 3, wide=True),
    ),
    "table": (
        Tiles(128, 64, 64, 8, 3),
        Tiles(64, 128, 64, 8, 3),
        Tiles(64, 32, 64, 4, 4),
        Tiles(128, 128, 64, 8, 3, wide=True),
    ),
    "float32": (Tiles(32, 32, 32, 8, 2),),
}
# The same of dX, whose sums stand in registers once, with a low-rank term and without. block_k is
# as large as a group, at most: a tile of W has one scale in each of its rows. On sm_80 64 x 128 x
# 128 of eight warps or 64 x 64 x 128 of four took up to 160 bytes of stack.
GRADIENT_TILES: dict[str, tuple[Tiles, ...]] = {
    "codes": (
        Tiles(32, 128, 128, 8, 4),
        Tiles(64, 128, 64, 8, 3),
        Tiles(64, 64, 128, 8, 3),
        Tiles(64, 32, 128, 8, 4),
        Tiles(64, 128, 128, 8, 3, wide=True),
    ),
    "table": (
        Tiles(32, 128, 128, 8, 4),
        Tiles(64, 128, 64, 8, 3),
        Tiles(64, 64, 128, 8, 3),
        Tiles(64, 128, 128, 8, 3, wide=True),
    ),
    "float32": (Tiles(32, 32, 32, 8, 2),),
}
# Where Triton loads each element by itself.
UNALIGNED_TILES = Tiles(32, 32, 32, 8, 2)
SMALLEST_BLOCK_K = 32

# What the CUDA kernels can take; csrc/cuda/ptq4_gemv.cu and ptq4_mma.cu.
GEMV_ROWS, GEMV_GROUP, GEMV_BLOCK_ROWS, GEMV_SLAB = 4, 16, 8, 2048
MMA_ROWS, MMA_GROUP, MMA_BLOCK_ROWS, MMA_SLAB = 64, 32, 128, 512
# Blocks of eight warps that a multiprocessor has at a time, and that keep the memory busy.
GEMV_BLOCKS_PER_MULTIPROCESSOR = 3
MMA_BLOCKS_PER_MULTIPROCESSOR = 2


def common_group(k: int, group_size: int, first: int = 0) -> int:
    """The largest tile along K, a power of two of at least 32, whose columns have one group in
    every tile from ``first`` on; 0 where there is none."""
    reach = 1 << 30
    # x & -x: the largest power of two that divides x.
    if group_size < k:
        reach = min(reach, group_size & -group_size)
    if first:
        reach = min(reach, first & -first)
    return reach if reach >= SMALLEST_BLOCK_K else 0


def parts_of(length: int, tile: int, programs: int, multiprocessors: int) -> tuple[int, int]:
    """Into how many parts K is cut so that every multiprocessor has a program, and the elements of
    one, of whole tiles; a part has at least four tiles, or cutting costs more than it gives."""
    tiles = -(-length // tile)
    wanted = max(1, min(multiprocessors // max(programs, 1), tiles // 4))
    tiles_per_part = -(-tiles // wanted)
    return max(1, -(-tiles // max(tiles_per_part, 1))), tiles_per_part * tile


def splits_of(engine: str, problem: Problem, multiprocessors: int) -> int:
    """Into how many parts of K the blocks of gemv or mma are cut. A part is at least a slab, which
    keeps every warp of a block busy and a pipeline full."""
    per_block, slab, blocks_at_a_time = {
        "gemv": (GEMV_BLOCK_ROWS, GEMV_SLAB, GEMV_BLOCKS_PER_MULTIPROCESSOR),
        "mma": (MMA_BLOCK_ROWS, MMA_SLAB, MMA_BLOCKS_PER_MULTIPROCESSOR),
    }[engine]
    blocks = -(-problem.n // per_block)
    return max(1, min(blocks_at_a_time * multiprocessors // blocks, problem.k // slab))


def panel_width(length: int, across: int, itemsize: int) -> int:
    """How many of W's rows, or columns, a panel has, ``across`` elements each."""
    fitting = PANEL_BYTES // max(across * itemsize, 1)
    return min(length, max(fitting // PANEL_MULTIPLE, 1) * PANEL_MULTIPLE)


def _whole_groups(problem: Problem, multiple: int) -> bool:
    return problem.group_size % multiple == 0 or problem.group_size >= problem.k


def kind_of(problem: Problem) -> str:
    """What multiplies what: a key of :data:`PRODUCT_TILES` and :data:`GRADIENT_TILES`."""
    if problem.dtype == "float32":
        return "float32"
    return "table" if problem.table else "codes"


def why_not(engine: str, problem: Problem) -> str | None:
    """Why an engine cannot compute a problem, or None where it can."""
    if engine in ("gemv", "mma") and problem.direction != "forward":
        return f"{engine} is a forward"
    if engine == "gemv":
        if problem.m > GEMV_ROWS:
            return f"gemv takes at most {GEMV_ROWS} rows"
        if not _whole_groups(problem, GEMV_GROUP):
            return f"gemv takes groups of a multiple of {GEMV_GROUP}"
    if engine == "mma":
        if problem.dtype == "float32":
            return "mma takes a half dtype"
        if problem.m > MMA_ROWS:
            return f"mma takes at most {MMA_ROWS} rows"
        if problem.k % MMA_GROUP or not _whole_groups(problem, MMA_GROUP):
            return f"mma takes a K and groups of a multiple of {MMA_GROUP}"
        if not problem.aligned:
            return "mma takes rows that begin at multiples of 16 bytes"
    if engine == "product" and not common_group(problem.k, problem.group_size):
        return f"product takes groups of a multiple of {SMALLEST_BLOCK_K}"
    return None


def candidates(engine: str, problem: Problem) -> tuple[Tiles, ...]:
    """The tiles with which an engine may compute a problem, the default first."""
    if engine != "product":
        return ()
    largest = common_group(problem.k, problem.group_size)
    known = PRODUCT_TILES if problem.direction == "forward" else GRADIENT_TILES
    tiles = known[kind_of(problem)] if problem.aligned else (UNALIGNED_TILES,)
    found = (replace(one, block_k=min(one.block_k, largest)) for one in tiles)
    return tuple(dict.fromkeys(found))


def plan(problem: Problem, device: str, engines: Collection[str]) -> Choice:
    """The engine for a problem on a device of that name, of those that a backend has.

    What is forced comes first, where it can compute the problem at all; then the measurement
    nearest to the problem, if there is one within reach; then panels.
    """
    choice = _measured_choice(problem, device) if _forced is None else _able(_forced, problem)
    if choice.engine in engines:
        return choice
    return Choice("panels", f"{choice.why}, but this backend has no {choice.engine}")


def _able(choice: Choice, problem: Problem) -> Choice:
    """The choice, or panels where its engine cannot compute the problem; with tiles of its own."""
    why = why_not(choice.engine, problem)
    if why is not None:
        return Choice("panels", f"{choice.why}, but {why}")
    offered = candidates(choice.engine, problem)
    if choice.tiles in offered or not offered:
        return choice
    return replace(choice, tiles=offered[0])


@functools.lru_cache(maxsize=4096)
def _measured_choice(problem: Problem, device: str) -> Choice:
    rows = table().get(device, {}).get("rows")
    if not rows:
        return Choice("panels", f"nothing has been measured on {device}")
    found = _measured.nearest(rows, problem, SAME, NEAR)
    if found is None:
        return Choice("panels", f"nothing near has been measured on {device}")
    why = f"measured on {device} at M={found['m']} N={found['n']} K={found['k']}"
    tiles = None if found["tiles"] is None else Tiles(*found["tiles"])
    return _able(Choice(found["engine"], why, tiles), problem)


def table() -> dict[str, Any]:
    """The committed measurements, by device name."""
    return _measured.read(TABLE)


def forget() -> None:
    """Read the table anew at the next call."""
    _measured.read.cache_clear()
    _measured_choice.cache_clear()


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
        raise ValueError(f"PYFASTFT_INT4_ENGINE: expected {known} or auto, got {name!r}")
    return Choice(name, why, tiles)


SAME = ("direction", "group_size", "dtype", "zero", "table", "aligned", "adapter", "dropout")
NEAR = ("m", "n", "k")
# Process-wide, as a forced backend is, and for its reason.
_forced = _forced_choice(os.environ.get("PYFASTFT_INT4_ENGINE", ""), "PYFASTFT_INT4_ENGINE says so")
