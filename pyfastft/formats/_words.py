"""What the 4-bit formats share: int32 words of eight codes, and the checks of their tensors."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch

from pyfastft._check import name_of
from pyfastft.quantization.tensor import QTensor4, pack_codes, unpack_codes

SCALES = (torch.float16, torch.bfloat16, torch.float32)
CODES_PER_WORD = 8


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer as a file has it.

    Attributes:
        weight: its weight.
        options: what the format's ``encode`` takes to give the file's tensors bit for bit.
    """

    weight: QTensor4
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def codes_of(words: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 words (R, ceil(C / 8)), the first code in the lowest bits, as codes (R, C)."""
    return unpack_codes(bytes_of(words), columns)


def bytes_of(words: torch.Tensor) -> torch.Tensor:
    """The words' bytes in rising order: codes as :class:`QTensor4` has them."""
    _expect_little_endian()
    # Flat: a dimension of one may have any stride, which a view in another size refuses.
    flat = words.contiguous().flatten()
    return flat.view(torch.uint8).view(words.shape[0], words.shape[1] * 4)


def words_of(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`codes_of`; the rest of a last word is zeros."""
    return words_of_bytes(pack_codes(codes))


def words_of_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`bytes_of`, filled up with zeros."""
    _expect_little_endian()
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).contiguous()
    return padded.flatten().view(torch.int32).view(padded.shape[0], padded.shape[1] // 4)


def _expect_little_endian() -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("4-bit files can be read on little-endian machines only")


def take(
    tensors: Mapping[str, torch.Tensor], names: Collection[str], optional: Collection[str] = ()
) -> list[torch.Tensor | None]:
    """The tensors of these names, then the optional ones or None; none may be left over."""
    for name in names:
        if name not in tensors:
            raise ValueError(f"expected a tensor {name}, got none")
    if left_over := sorted(tensors.keys() - {*names, *optional}):
        raise ValueError(f"expected no tensor {left_over[0]}")
    return [tensors.get(name) for name in (*names, *optional)]


def expect(
    name: str,
    tensor: torch.Tensor | None,
    shape: tuple[int | None, ...],
    dtypes: Collection[torch.dtype],
) -> torch.Tensor:
    """The tensor, if it is of this shape, where None is any size, and of one of these dtypes."""
    assert tensor is not None
    wrong = len(tensor.shape) != len(shape) or any(
        wanted is not None and wanted != size
        for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if wrong:
        text = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"expected {name} of shape ({text}), got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        what = " or ".join(map(name_of, dtypes))
        raise ValueError(f"expected {name} of dtype {what}, got {name_of(tensor.dtype)}")
    return tensor


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """A file's scale in the dtype that :class:`QTensor4` keeps it in: no value changes."""
    return scale.float() if scale.dtype is torch.float16 else scale


def scale_as(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A scale in a file's dtype, if no value changes."""
    there = scale.to(dtype)
    if not torch.equal(there.to(torch.float32), scale.to(torch.float32)):
        raise ValueError(
            f"expected a scale that {name_of(dtype)} holds exactly; "
            f"quantize with scale_dtype={name_of(dtype)!r}"
        )
    return there


def integer_zero(weight: QTensor4, what: str) -> torch.Tensor:
    """The zero-points (N, G) as integers, 8 where none are stored."""
    if weight.codebook != "int4":
        raise ValueError(f"expected a weight of codebook 'int4' for {what}, got {weight.codebook}")
    if weight.zero is None:
        return torch.full(weight.scale.shape, 8, dtype=torch.uint8, device=weight.device)
    if weight.zero.dtype is not torch.uint8:
        raise ValueError(
            f"expected zero-points that are integers for {what}, got "
            f"{name_of(weight.zero.dtype)}; quantize with round_zero=True"
        )
    return weight.zero


def implied(zero: torch.Tensor) -> torch.Tensor | None:
    """None for zero-points that are all 8, which need not be stored."""
    return None if bool((zero == 8).all()) else zero.contiguous()


def group_size_of(k: int, groups: int, group_size: int | None) -> int:
    """The group size of a weight with so many groups; given, it must fit."""
    if group_size is not None and group_size <= 0:
        group_size = max(k, 1)  # -1 is one group per row
    if group_size is None:
        if groups <= 1:
            return max(k, 1)
        if k % groups:
            raise ValueError(f"expected a group size, {k} inputs are not {groups} equal groups")
        return k // groups
    if -(-k // group_size) != groups:
        raise ValueError(f"expected scales of {-(-k // group_size)} groups, got {groups}")
    return min(group_size, max(k, 1))


def order_of(g_idx: torch.Tensor, groups: int) -> tuple[int, torch.Tensor | None]:
    """The group size, and the order that brings each group's inputs together, None where they are.

    Args:
        g_idx: the group of each input, (K,).
        groups: how many there are.
    """
    k = len(g_idx)
    if k and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        raise ValueError(f"expected g_idx of values from 0 to {groups - 1}, got others")
    members = torch.bincount(g_idx, minlength=groups).tolist()
    size = max(members[0] if members else 1, 1)
    order = torch.argsort(g_idx, stable=True)
    regular = torch.arange(k, device=g_idx.device) // size
    if not torch.equal(g_idx[order].long(), regular):
        raise ValueError(
            f"expected g_idx of groups of one size, the last one at most, got sizes {members[:4]}"
        )
    in_order = bool((order == torch.arange(k, device=g_idx.device)).all())
    return size, None if in_order else order.to(torch.int32)


def group_index(weight: QTensor4) -> torch.Tensor:
    """The group of each input, int32 (K,): the inverse of :func:`order_of`."""
    groups = torch.arange(weight.k, dtype=torch.int32, device=weight.device) // weight.group_size
    if weight.perm is None:
        return groups
    return torch.empty_like(groups).index_copy_(0, weight.perm.long(), groups)


def in_input_order(weight: QTensor4) -> torch.Tensor:
    """The codes (N, K), one in a byte, by input."""
    codes = weight.unpack()
    if weight.perm is None:
        return codes
    return torch.empty_like(codes).index_copy_(1, weight.perm.long(), codes)
