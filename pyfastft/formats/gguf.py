r"""GGUF files' 4-bit tensors: Q4_0, Q4_1 and Q4_K.

Blocks of 32 weights along K, of Q4_K super-blocks of eight blocks, with d, m and d_min in float16:

- Q4_0: d and 16 bytes, the first half of the weights in their low halves; :math:`W = d (c - 8)`;
- Q4_1: d, m and 16 bytes, in the same order; :math:`W = d c + m`;
- Q4_K: d, d_min, 12 bytes with eight 6-bit scales s and minima m, and 128 bytes, each 32 of which
  hold one block in their low halves and the next one in the high ones;
  :math:`W = d s c - d_{min} m`.

A minimum becomes a float zero-point, :math:`z = -m / d`. Where d is 0, of blocks of one value, the
scale is 1, the codes are 0 and z is that value's negative.

The file is read through a cursor that checks every length against what is left. It is not mapped,
nothing in it is executed, and tensors of other kinds are left out.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyfastft.formats._files import naming
from pyfastft.quantization.tensor import QTensor4

__all__ = ["Contents", "TensorInfo", "decode", "encode_q4_0", "load", "read_header"]

MAGIC = b"GGUF"
# The number of a kind of tensor in the file: its name, weights in a block, bytes in a block.
KINDS = {2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 12: ("Q4_K", 256, 144)}
_NUMBERS = {name: number for number, (name, *_) in KINDS.items()}
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS, _MOST_NESTED = 4, 4
_DEFAULT_ALIGNMENT = 32
_MOST_WEIGHTS = 2**40


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file announces it.

    Attributes:
        kind: the number of its kind; :data:`KINDS` has those that are read.
        shape: as torch has it, the innermost dimension last.
        offset: of its first byte in the file.
    """

    kind: int
    shape: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file announces: its metadata and its tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


class _Cursor:
    """Reads from bytes, and never past their end."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, size: int, what: str) -> bytes:
        """So many bytes."""
        left = len(self.content) - self.at
        if size > left:
            raise ValueError(f"expected {what} of {size} bytes at {self.at}, got {left}")
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, code: str, what: str) -> Any:
        """One number of struct's kinds."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        """A length and UTF-8."""
        raw = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"expected {what} of UTF-8, got {raw[:20]!r}") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A value of one of GGUF's kinds."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise ValueError(f"expected {what} of a kind from 0 to 12, got {kind}")
        if depth >= _MOST_NESTED:
            raise ValueError(f"expected {what} of arrays nested {_MOST_NESTED} deep at most")
        of = self.number("I", f"the kind of {what}")
        count = self.number("Q", f"the length of {what}")
        if of in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[of])
            raw = self.take(count * size, what)
            return list(struct.unpack(f"<{count}{_SCALARS[of]}", raw))
        # Each string or array takes eight bytes at least, so a lie about the count ends here.
        if count * 8 > len(self.content) - self.at:
            raise ValueError(f"expected {what} of {count} values, got the end of the file")
        return [self.value(of, what, depth + 1) for _ in range(count)]


def read_header(content: bytes) -> Contents:
    """What the file announces, every number checked against its size.

    Raises:
        ValueError: it is no GGUF file of version 2 or 3, is cut short, or contradicts itself.
    """
    cursor = _Cursor(content)
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise ValueError(f"expected the magic number {MAGIC!r}, got {magic!r}")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise ValueError(f"expected version 2 or 3, got {version}")
    count = cursor.number("Q", "the number of tensors")
    pairs = cursor.number("Q", "the number of metadata")
    # A pair takes 13 bytes at least, a tensor 24.
    if pairs * 13 + count * 24 > len(content):
        raise ValueError(f"expected {pairs} metadata and {count} tensors, got {len(content)} bytes")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ValueError(f"expected metadata keys that differ, got {key!r} twice")
        metadata[key] = cursor.value(cursor.number("I", f"the kind of {key}"), key)
    infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = cursor.string("a tensor's name")
        if name in infos:
            raise ValueError(f"expected tensors' names that differ, got {name!r} twice")
        dimensions = cursor.number("I", f"the dimensions of {name}")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"expected {name} of {_MOST_DIMENSIONS} dimensions, got {dimensions}")
        sizes = tuple(cursor.number("Q", f"the shape of {name}") for _ in range(dimensions))
        kind = cursor.number("I", f"the kind of {name}")
        infos[name] = kind, sizes[::-1], cursor.number("Q", f"the offset of {name}")
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"expected general.alignment of a power of two, got {alignment!r}")
    data = -(-cursor.at // alignment) * alignment
    tensors = {n: TensorInfo(kind, s, data + at) for n, (kind, s, at) in infos.items()}
    for name, info in tensors.items():
        _expect_to_fit(name, info, len(content), alignment)
    return Contents(metadata, tensors)


def _expect_to_fit(name: str, info: TensorInfo, total: int, alignment: int) -> None:
    if math.prod(info.shape) > _MOST_WEIGHTS:
        raise ValueError(f"expected {name} of {_MOST_WEIGHTS} weights at most, got {info.shape}")
    if info.offset % alignment:
        raise ValueError(f"expected {name} at a multiple of {alignment}, got {info.offset}")
    if info.kind not in KINDS:
        return
    kind, weights, size = KINDS[info.kind]
    k = info.shape[-1] if info.shape else 0
    if not k or k % weights:
        raise ValueError(
            f"expected {name} of {kind} of rows of {weights} weights, got {info.shape}"
        )
    end = info.offset + math.prod(info.shape) // weights * size
    if end > total:
        raise ValueError(f"expected {name} to end at {end}, got a file of {total} bytes")


def load(path: str | os.PathLike[str]) -> dict[str, QTensor4]:
    """A file's 4-bit tensors by name; those of more than two dimensions by their last one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = path.read_bytes()
    with naming(path):
        layers = {}
        for name, info in read_header(content).tensors.items():
            if info.kind in KINDS:
                kind, weights, size = KINDS[info.kind]
                k = info.shape[-1]
                n = math.prod(info.shape) // k
                end = info.offset + n * k // weights * size
                raw = torch.frombuffer(bytearray(content[info.offset : end]), dtype=torch.uint8)
                try:
                    layers[name] = decode(raw, kind, n, k)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return layers


def decode(raw: torch.Tensor, kind: str, n: int, k: int) -> QTensor4:
    """The weight (N, K) of a tensor's bytes.

    Args:
        raw: uint8, all blocks.
        kind: ``"Q4_0"``, ``"Q4_1"`` or ``"Q4_K"``.
        n, k: N and K, K a multiple of the block.

    Raises:
        ValueError: the bytes are not those of N K weights, or a scale is not finite.
    """
    if kind not in _NUMBERS:
        raise ValueError(f"expected a kind of {', '.join(_NUMBERS)}, got {kind!r}")
    _, weights, size = KINDS[_NUMBERS[kind]]
    if k % weights or raw.numel() != n * k // weights * size:
        raise ValueError(f"expected {kind} of rows of {weights} weights in blocks of {size} bytes")
    blocks = raw.view(-1, size)
    if kind == "Q4_0":
        codes = _halves(blocks[:, 2:])
        return _weight(codes, _numbers(blocks, 0), None, n, k)
    if kind == "Q4_1":
        codes = _halves(blocks[:, 4:])
        return _weight(codes, _numbers(blocks, 0), _numbers(blocks, 2), n, k)
    d, d_min = _numbers(blocks, 0), _numbers(blocks, 2)
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _halves(blocks[:, 16:].reshape(-1, 32)).view(-1, 32)
    return _weight(
        codes, (d[:, None] * scales).flatten(), -(d_min[:, None] * minima).flatten(), n, k
    )


def encode_q4_0(weight: QTensor4) -> torch.Tensor:
    """The bytes of a weight as Q4_0: the inverse of :func:`decode`.

    Raises:
        ValueError: the weight is not of int4 in groups of 32 without zero-points, of an even number
            of them, or float16 does not hold its scales exactly.
    """
    whole = weight.k % 32 == 0 and weight.group_size == 32
    if not whole or weight.codebook != "int4" or weight.perm is not None or weight.zero is not None:
        raise ValueError("expected int4 in groups of 32 without zero-points for Q4_0")
    d = weight.scale.to(torch.float16)
    if not torch.equal(d.float(), weight.scale.float()):
        raise ValueError("expected scales that float16 holds exactly for Q4_0")
    codes = weight.unpack().view(-1, 2, 16)
    return torch.cat((d.view(-1, 1).view(torch.uint8), codes[:, 0] | codes[:, 1] << 4), 1).flatten()


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """Bytes (B, S) as codes (B, 2 S): the low halves, then the high ones."""
    return torch.cat((packed & 15, packed >> 4), 1)


def _numbers(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at this byte of each block, as float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).flatten().float()


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q4_K's eight scales and minima of a super-block (B, 12): the first four in whole bytes' low
    six bits, of the others the high two bits in those bytes' high ones."""
    first, second, rest = packed.view(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), 1)
    minima = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), 1)
    return scales.float(), minima.float()


def _weight(
    codes: torch.Tensor, d: torch.Tensor, m: torch.Tensor | None, n: int, k: int
) -> QTensor4:
    """The weight of codes (B, 32), and of W = d c + m or d (c - 8)."""
    if not bool(torch.isfinite(d).all()) or not (m is None or bool(torch.isfinite(m).all())):
        raise ValueError("expected finite scales and minima, got others")
    zero = None
    if m is not None:
        constant = d == 0
        codes = codes.masked_fill(constant[:, None], 0)
        d = d.masked_fill(constant, 1.0)
        zero = (-m / d).view(n, k // 32)
    return QTensor4.from_codes(codes.reshape(n, k), d.view(n, k // 32), zero=zero, group_size=32)
