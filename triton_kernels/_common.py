"""What kernels share: the dropout mask of :mod:`pyfastft._random`, and facts about the device."""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

from pyfastft._random import GROUP
from pyfastft.triton_kernels._plan import Device

# Triton decides when a kernel is defined whether it will be interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_GROUP = tl.constexpr(GROUP)

DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# How every kernel with registers to spare is compiled. Left alone, ptxas spills a few bytes to
# reach its next step of occupancy.
OPTIONS = {"enable_fp_fusion": True, "maxnreg": 255}


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        multiprocessors=properties.multi_processor_count,
        capability=(properties.major, properties.minor),
    )


def device_of(tensor: torch.Tensor) -> Device:
    """What :func:`plan` wants to know of a tensor's device; the interpreter is one processor."""
    if INTERPRETED:
        return Device(multiprocessors=1, capability=(8, 0))
    return _device(tensor.device.index)


def why_no_triton(tensor: torch.Tensor) -> str | None:
    """Why kernels cannot run on a tensor, or None where they can."""
    if tensor.dtype is torch.float64:
        return "float64 is the reference's"
    if INTERPRETED:
        return None
    if tensor.device.type != "cuda":
        where = tensor.device.type
        return f"Triton needs a CUDA device, not {where}, unless TRITON_INTERPRET=1 is set"
    if torch.version.hip is not None:
        return "the kernels are neither tuned nor tested on ROCm"
    capability = device_of(tensor).capability
    if capability < (8, 0):
        return f"needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    return None


@triton.jit
def _philox(rng_ptr, group):
    """Four 32-bit words for each 64-bit group of elements; the key is the seed at rng_ptr."""
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1)
    return tl.philox(
        seed,
        group.to(tl.uint32),
        (group >> 32).to(tl.uint32),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
    )


@triton.jit
def dropout_keep(
    rng_ptr,
    rows,
    first_column,
    width,
    threshold,
    BLOCK_C: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Which elements of a tile of a matrix with ``width`` columns are kept.

    Args:
        rng_ptr: (seed, offset), int64.
        rows: int64 row indices of the tile.
        first_column: its first column; a multiple of 8 where GROUPED.
        width: columns of the whole matrix; a multiple of 8 where GROUPED.
        threshold: of 65536; a 16-bit draw below it is dropped.
        BLOCK_C: columns of the tile.
        GROUPED: whether one call of Philox can serve the 8 elements of a group, all in one row.
    """
    if GROUPED:
        groups = first_column // _GROUP + tl.arange(0, BLOCK_C // _GROUP)
        w0, w1, w2, w3 = _philox(rng_ptr, rows[:, None] * (width // _GROUP) + groups[None, :])
        # Compared before they are spread: what moves between threads is bits, not words.
        limit = threshold.to(tl.uint32)
        low = tl.interleave(
            tl.interleave((w0 & 0xFFFF) >= limit, (w2 & 0xFFFF) >= limit),
            tl.interleave((w1 & 0xFFFF) >= limit, (w3 & 0xFFFF) >= limit),
        )
        high = tl.interleave(
            tl.interleave((w0 >> 16) >= limit, (w2 >> 16) >= limit),
            tl.interleave((w1 >> 16) >= limit, (w3 >> 16) >= limit),
        )
        keep = tl.interleave(low, high)
    else:
        columns = first_column + tl.arange(0, BLOCK_C)
        element = rows[:, None] * width + columns[None, :]
        w0, w1, w2, w3 = _philox(rng_ptr, element // _GROUP)
        half = (element % _GROUP).to(tl.int32)
        word = tl.where(half < 4, tl.where(half < 2, w0, w1), tl.where(half < 6, w2, w3))
        draw = tl.where(half % 2 == 0, word & 0xFFFF, word >> 16)
        keep = draw >= threshold.to(tl.uint32)
    return keep
