"""Launch parameters: pure functions of the problem and the device, with the reasons beside them.

No autotuning: a plan depends on nothing but its arguments, so results repeat from run to run, and
every plan that can come out is compiled by the tests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a plan depends on."""

    multiprocessors: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """One stage of lora_linear: a wide matrix of ``rows`` x ``columns`` and a thin rank."""

    stage: str  # "project", "update" or "gradient"
    rows: int
    columns: int
    rank: int
    half: bool  # tensor cores multiply bfloat16 or float16; else IEEE float32 on FMA units
    mask_by_element: bool = False  # dropout where 8 elements cannot share one call of Philox


@dataclass(frozen=True)
class Launch:
    """Tiles of rows, columns and rank; into how many parts the reduced dimension is cut."""

    block_m: int
    block_c: int
    block_r: int
    splits: int
    part: int  # elements of the reduced dimension in one part, a multiple of its tile
    num_warps: int
    num_stages: int


# Programs per multiprocessor that a reduction aims at: two hide each other's barriers, and each
# further one adds a buffer of partial sums.
PROGRAMS_PER_MULTIPROCESSOR = 2

# (stage, half) -> {block_r: (block_m, block_c, num_warps, num_stages)}.
#
# A rank takes the smallest block_r that holds it, or several of the largest. Tensor cores take no
# side below 16: a smaller rank is padded by masked loads.
#
# project and gradient read the wide matrix once: tiles of 16 KiB, several in flight, keep the
# memory busy. In gradient block_c is bounded by sm_100: 256 columns whose loads Triton cannot align
# spill there. float32 runs without tensor cores and holds its operands in registers.
# update writes each element once, and its loop over the rank is inside the program: a large block_r
# would only take registers, and there is nothing to pipeline.
# Above 32 ranks float32 is bound by arithmetic: reading the wide matrix once per 32 costs nothing.
# In half precision it is read once per 64: tiles of 128 ranks spill on one architecture or another.
TILES = {
    ("project", True): {16: (64, 64, 4, 4), 32: (64, 64, 8, 4), 64: (64, 64, 8, 4)},
    ("project", False): {16: (32, 32, 4, 1), 32: (32, 32, 4, 1)},
    ("update", True): {16: (64, 128, 8, 1), 32: (64, 128, 8, 1)},
    ("update", False): {16: (32, 32, 4, 1)},
    ("gradient", True): {16: (64, 128, 8, 3), 32: (64, 128, 8, 3), 64: (64, 128, 8, 3)},
    ("gradient", False): {16: (32, 64, 8, 2), 32: (32, 64, 8, 2)},
}

# Largest tile (rows, columns) whose every element needs its own call of Philox: 64 bits of counter
# and ten rounds for each take many registers.
MASKED_TILE = (16, 32)


def plan(problem: Problem, device: Device) -> Launch:
    """Launch parameters of one stage on one device."""
    tiles_of_rank = TILES[problem.stage, problem.half]
    block_r = min((b for b in tiles_of_rank if b >= problem.rank), default=max(tiles_of_rank))
    block_m, block_c, num_warps, num_stages = tiles_of_rank[block_r]
    if problem.mask_by_element:
        block_m, block_c = min(block_m, MASKED_TILE[0]), min(block_c, MASKED_TILE[1])
    over_rows, over_columns, over_rank = (
        _ceil(problem.rows, block_m),
        _ceil(problem.columns, block_c),
        _ceil(problem.rank, block_r),
    )
    # How many programs there are without cutting, and how many tiles each would go through.
    reduced_tile, programs, tiles = {
        "project": (block_c, over_rows * over_rank, over_columns),
        "update": (block_r, over_rows * over_columns, 1),
        "gradient": (block_m, over_columns * over_rank, over_rows),
    }[problem.stage]
    splits, part = parts_of(tiles * reduced_tile, reduced_tile, programs, device)
    return Launch(
        block_m=block_m,
        block_c=block_c,
        block_r=block_r,
        splits=splits,
        part=part,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def one_pass(rank: int, itemsize: int, launch: Launch) -> bool:
    """Whether grad B and grad^T xa should share one pass over grad.

    Sharing leaves a float32 part of t per column tile, written and read again: 8 bytes x rank for
    each row and tile, against a second reading of block_c elements.
    """
    return 8 * rank < itemsize * launch.block_c


# -- the methods beside lora_linear ----------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A tile of a matrix, the ranks that go with it, and how its program is compiled."""

    rows: int
    columns: int
    rank: int
    num_warps: int
    num_stages: int


# half -> (rows, columns, the largest tile of ranks, num_warps, num_stages).
#
# norm streams W once: 32 rows a program, so that 4096 rows give a program to every multiprocessor.
# sums makes a tile of U V^T and throws it away. What bounds both in half precision are loads of a
# W whose alignment Triton cannot know, with an address for each element: norm spilled on 4 warps or
# with 64 ranks, sums with 128 columns. float32 has its operands in registers, too.
NORM_TILES = {True: (32, 128, 32, 8, 3), False: (32, 32, 16, 4, 1)}
SUMS_TILES = {True: (64, 64, 32, 8, 2), False: (32, 32, 16, 4, 1)}
# Elements by rows of 256 bytes at least; there is nothing to multiply.
SCALE_TILE = Tile(rows=16, columns=128, rank=0, num_warps=4, num_stages=1)


def tile_of(tiles: dict[bool, tuple[int, int, int, int, int]], rank: int, half: bool) -> Tile:
    """The tile for a rank; tensor cores take no side below 16, and a dot product none either."""
    rows, columns, largest, num_warps, num_stages = tiles[half]
    block_r = min(max(16, 1 << (rank - 1).bit_length()), largest)
    return Tile(rows, columns, block_r, num_warps, num_stages)


def parts_of(length: int, tile: int, programs: int, device: Device) -> tuple[int, int]:
    """Into how many parts a reduced dimension is cut, and the elements of one, of whole tiles."""
    tiles = _ceil(length, tile)
    wanted = _ceil(PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors, programs)
    tiles_per_part = _ceil(tiles, min(wanted, tiles))
    return _ceil(tiles, tiles_per_part), tiles_per_part * tile


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
