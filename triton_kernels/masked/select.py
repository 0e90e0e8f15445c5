"""select_topk on Triton: a radix selection over all tensors, then one collection in order.

Symbols as in ``pyfastft/ops/masked.md``. A score becomes a 32-bit key, ascending where the wanted
come first. Three readings of the tensors count the keys' digits, from the high one down, among
those that agree with the digits found; so the k-th key is known exactly. A fourth counts what each
chunk will give, a fifth writes it. Counts are integers: atomic additions of them are exact in any
order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from pyfastft._op import implement
from pyfastft.ops.masked._rectangles import expect_index, matrix_of
from pyfastft.triton_kernels._common import _philox
from pyfastft.triton_kernels.masked._rectangles import (
    EXACT_OPTIONS,
    search_steps,
    tensor_of,
    unsupported,
)

# Elements of a program and of one of its tiles.
_CHUNK, _TILE = 32768, 2048
# (lowest bit, bits) of each digit.
_DIGITS = ((21, 11), (10, 11), (0, 10))
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Chunks before, a, b, excluded, elements, columns, the kind of a's dtype, elements before.
_FIELDS = 8
_BLOCK = 1024


@triton.jit
def _mark_kernel(bits_ptr, offsets_ptr, count, BLOCK: tl.constexpr):
    """Sets the bit of every offset."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.load(offsets_ptr + number, mask=number < count, other=0).to(tl.int64)
    bit = tl.full((BLOCK,), 1, tl.int32) << (offset % 32).to(tl.int32)
    tl.atomic_or(bits_ptr + offset // 32, bit, mask=number < count, sem="relaxed")


@triton.jit
def _load(address, at, there, kind):
    """Elements in float32 of a tensor of any kind."""
    if kind == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=there, other=0.0)
    elif kind == 1:
        short = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=there, other=0.0)
        value = short.to(tl.float32)
    else:
        half = tl.load(address.to(tl.pointer_type(tl.float16)) + at, mask=there, other=0.0)
        value = half.to(tl.float32)
    return value


@triton.jit
def _tile_keys(row, rng_ptr, first, SCORE: tl.constexpr, LARGEST: tl.constexpr, TILE: tl.constexpr):
    """The keys of a tile of a tensor, and which of its elements can be selected."""
    at = first + tl.arange(0, TILE)
    there = at < tl.load(row + 4)
    excluded = tl.load(row + 3)
    if excluded != 0:
        word = tl.load(excluded.to(tl.pointer_type(tl.int32)) + at // 32, mask=there, other=0)
        there = there & ((word >> (at % 32).to(tl.int32)) & 1 == 0)
    if SCORE == "random":
        position = tl.load(row + 7) + at
        w0, w1, w2, w3 = _philox(rng_ptr, position // 4)
        which = (position % 4).to(tl.int32)
        key = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
        if LARGEST:
            key = ~key
    else:
        kind = tl.load(row + 6)
        score = _load(tl.load(row + 1), at, there, kind)
        if SCORE == "magnitude":
            score = tl.abs(score)
        elif SCORE == "square":
            score = score * score
        elif SCORE == "wanda":
            by_column = tl.load(row + 2).to(tl.pointer_type(tl.float32))
            score = tl.abs(score) * tl.load(by_column + at % tl.load(row + 5), mask=there)
        elif SCORE != "value":
            other = _load(tl.load(row + 2), at, there, kind)
            if SCORE == "product":
                score = tl.abs(score * other)
            elif SCORE == "movement":
                score = -(score * other)
            else:
                score = tl.abs(score - other)
        # -0 is 0.
        score = tl.where(score == 0, 0.0, score)
        bits = score.to(tl.uint32, bitcast=True)
        key = tl.where(bits >> 31 != 0, ~bits, bits | 0x80000000)
        if LARGEST:
            key = ~key
        key = tl.where(score == score, key, 0xFFFFFFFF)
    return key, there


@triton.jit
def _count_digits_kernel(
    counts_ptr,
    table_ptr,
    chosen_ptr,
    rng_ptr,
    tensors,
    SCORE: tl.constexpr,
    LARGEST: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds to counts (2^BITS,) how many keys of a chunk, of those that begin as chosen, have each
    digit."""
    chunk = tl.program_id(0).to(tl.int64)
    row = table_ptr + tensor_of(table_ptr, chunk, tensors, FIELDS, STEPS) * FIELDS
    first = (chunk - tl.load(row)) * CHUNK
    chosen = tl.load(chosen_ptr).to(tl.uint32)
    counts = tl.zeros((1 << BITS,), tl.int32)
    for start in range(0, tl.minimum(tl.load(row + 4) - first, CHUNK), TILE):
        key, there = _tile_keys(row, rng_ptr, first + start, SCORE, LARGEST, TILE)
        if SHIFT + BITS < 32:
            there = there & (key >> (SHIFT + BITS) == chosen)
        digit = (key >> SHIFT) & ((1 << BITS) - 1)
        counts += tl.histogram(digit.to(tl.int32), 1 << BITS, mask=there)
    to = counts_ptr + tl.arange(0, 1 << BITS)
    tl.atomic_add(to, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _choose_digit_kernel(chosen_ptr, counts_ptr, BITS: tl.constexpr):
    """Extends chosen (2,), the key's first digits and the rank wanted among those that have them,
    by the digit in which that rank falls."""
    counts = tl.load(counts_ptr + tl.arange(0, 1 << BITS))
    up_to = tl.cumsum(counts, axis=0)
    digits, rank = tl.load(chosen_ptr), tl.load(chosen_ptr + 1)
    digit = tl.sum((up_to < rank).to(tl.int64), axis=0)
    below = tl.max(tl.where(up_to < rank, up_to, 0), axis=0)
    tl.store(chosen_ptr, digits * (1 << BITS) + digit)
    tl.store(chosen_ptr + 1, rank - below)


@triton.jit
def _collect_kernel(
    index_ptr,
    places_ptr,
    table_ptr,
    chosen_ptr,
    rng_ptr,
    tensors,
    chunks,
    SCORE: tl.constexpr,
    LARGEST: tl.constexpr,
    WRITE: tl.constexpr,
    FIELDS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of the keys of a chunk, those before the k-th and those equal to it.

    Without WRITE their counts go to places (2, chunks); with it, places holds how many stand in the
    chunks before, and the positions of those selected are written where they belong.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row = table_ptr + tensor_of(table_ptr, chunk, tensors, FIELDS, STEPS) * FIELDS
    first = (chunk - tl.load(row)) * CHUNK
    last, wanted = tl.load(chosen_ptr).to(tl.uint32), tl.load(chosen_ptr + 1)
    before = tl.zeros((), tl.int64)
    equal = tl.zeros((), tl.int64)
    if WRITE:
        before = tl.load(places_ptr + chunk)
        equal = tl.load(places_ptr + chunks + chunk)
        position = tl.load(row + 7) + first + tl.arange(0, TILE)
    for start in range(0, tl.minimum(tl.load(row + 4) - first, CHUNK), TILE):
        key, there = _tile_keys(row, rng_ptr, first + start, SCORE, LARGEST, TILE)
        is_before = (there & (key < last)).to(tl.int32)
        is_equal = (there & (key == last)).to(tl.int32)
        if WRITE:
            of_before = before + tl.cumsum(is_before, axis=0) - is_before
            of_equal = equal + tl.cumsum(is_equal, axis=0) - is_equal
            selected = (is_before != 0) | ((is_equal != 0) & (of_equal < wanted))
            place = of_before + tl.minimum(of_equal, wanted)
            tl.store(index_ptr + place, position + start, mask=selected)
        before += tl.sum(is_before, axis=0)
        equal += tl.sum(is_equal, axis=0)
    if not WRITE:
        tl.store(places_ptr + chunk, before)
        tl.store(places_ptr + chunks + chunk, equal)


# -- launcher --------------------------------------------------------------------------------------


def _excluded_bits(tensor: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """One bit for each element of a tensor."""
    bits = torch.zeros(tensor.numel() // 32 + 1, dtype=torch.int32, device=tensor.device)
    _mark_kernel[(triton.cdiv(offsets.numel(), _BLOCK),)](
        bits,
        offsets.contiguous(),
        offsets.numel(),
        BLOCK=_BLOCK,
        num_warps=4,
        num_stages=1,
        **EXACT_OPTIONS,
    )
    return bits


@implement("select_topk", "triton", unsupported=unsupported)
def select_topk(
    index: torch.Tensor,
    counts: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    exclude: Sequence[torch.Tensor],
    k: int,
    score: str,
    largest: bool,
    rng: torch.Tensor | None,
) -> None:
    for tensor, offsets in zip(tensors, exclude, strict=False):
        expect_index("select_topk", offsets, 1, 1, 1, tensor.numel(), "exclude")
    if k == 0:
        counts.zero_()
        return
    device = tensors[0].device
    with torch.cuda.device_of(tensors[0]):
        table, edges, held = [], [0], []
        position = 0
        for i, tensor in enumerate(tensors):
            a = tensor.contiguous()
            b = others[i].contiguous() if others else a
            bits = None
            if exclude and exclude[i].numel():
                bits = _excluded_bits(tensor, exclude[i])
            held += [a, b, bits]
            columns = max(matrix_of(tensor)[1], 1) if tensor.dim() else 1
            addresses = (a.data_ptr(), b.data_ptr(), 0 if bits is None else bits.data_ptr())
            sizes = (tensor.numel(), columns, _KINDS[tensor.dtype], position)
            table.append((edges[-1], *addresses, *sizes))
            edges.append(edges[-1] + triton.cdiv(tensor.numel(), _CHUNK))
            position += tensor.numel()
        chunks, rows = edges[-1], torch.tensor(table, dtype=torch.int64, device=device)
        rng = None if rng is None else rng.contiguous()
        shared = {
            "SCORE": score,
            "LARGEST": largest,
            "FIELDS": _FIELDS,
            "STEPS": search_steps(len(table)),
            "CHUNK": _CHUNK,
            "TILE": _TILE,
            "num_warps": 8,
            "num_stages": 1,
            **EXACT_OPTIONS,
        }
        chosen = torch.tensor([0, k], dtype=torch.int64, device=device)
        for shift, bits_of_digit in _DIGITS:
            found = torch.zeros(1 << bits_of_digit, dtype=torch.int64, device=device)
            _count_digits_kernel[(chunks,)](
                found, rows, chosen, rng, len(table), SHIFT=shift, BITS=bits_of_digit, **shared
            )
            _choose_digit_kernel[(1,)](
                chosen, found, BITS=bits_of_digit, num_warps=4, num_stages=1, **EXACT_OPTIONS
            )
        places = torch.zeros((2, chunks + 1), dtype=torch.int64, device=device)
        own = torch.empty((2, chunks), dtype=torch.int64, device=device)
        launch = (rows, chosen, rng, len(table), chunks)
        _collect_kernel[(chunks,)](index, own, *launch, WRITE=False, **shared)
        torch.cumsum(own, 1, out=places[:, 1:])
        before = places[:, :-1].contiguous()
        _collect_kernel[(chunks,)](index, before, *launch, WRITE=True, **shared)
        ends = places[0] + torch.minimum(places[1], chosen[1])
        counts.copy_(ends[torch.tensor(edges, device=device)].diff())
