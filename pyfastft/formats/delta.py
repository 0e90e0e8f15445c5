"""Deltas as safetensors files: ``save_delta`` and ``load_delta``.

For a parameter P the file has the tensor ``P::values`` and, where nothing else makes its index,
``P::index``. The metadata has one entry, ``pyfastft.delta``: a line with the sha256 of manifest and
tensors, then the manifest in JSON. ``ops/masked.md`` has the layout in full.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from pyfastft._check import FLOATS, expect_dtype, name_of
from pyfastft.formats._files import naming
from pyfastft.formats._manifest import Kind, expect_fields
from pyfastft.ops.masked._rectangles import (
    expect_rectangles,
    matrix_of_shape,
    numbers_of,
    starts_of,
    wide,
)
from pyfastft.sparsity.delta import DERIVED, KINDS, Change, Delta, sha256_of
from pyfastft.sparsity.layouts import derived_index
from pyfastft.sparsity.set import SparseSet

__all__ = ["load_delta", "save_delta"]

_FILE = Kind("pyfastft.delta", "delta", version=1, fields={"kind": str, "parameters": dict})
_DTYPES = {name_of(dtype): dtype for dtype in FLOATS}
_DIGEST = re.compile("[0-9a-f]{64}")
# What the manifest says of a parameter, and more by what makes its index.
_FIELDS = {"shape": list, "dtype": str, "layout": str, "rows": int, "columns": int}
_FIELDS |= {"index": str, "fingerprint": str}
_MORE: dict[str, dict[str, type]] = {
    "all": {},
    "numbers": {"low_bits": int},
    "hashed": {"index_sha256": str, "recipe": dict},
    "nonzero": {"index_sha256": str},
}


def save_delta(
    source: Delta | nn.Module | Mapping[str, SparseSet],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write what training changed: of bfloat16 weights of which 1 % trained, 3.1 bytes for each.

    The file appears whole or not at all.

    Args:
        source: a model with trained sets, sets by the names of their parameters, or a delta.
        path: the file, of any name.
        dtype: bfloat16 halves the values of a difference; its entries are then off by at most
            2^-9 of what was added. Those of an absolute delta stay as they are.

    Raises:
        ValueError: there is no set, a value is not finite, or the delta's base is not known,
            because it was made with ``verify=False``.
        TypeError: values of that dtype are not kept.

    Example:
        >>> model, base = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
        >>> _ = base.load_state_dict(model.state_dict())
        >>> trained = ft.sparsity.rows(model.weight, [1, 2])
        >>> trained.write(torch.zeros(16))  # in the place of training
        >>> ft.save_delta({"weight": trained}, "task.delta")
        >>> delta = ft.load_delta("task.delta")
        >>> delta
        Delta(absolute: 16 entries of 1 weights)
        >>> back = delta.apply(base)
        >>> torch.equal(base.weight, model.weight)
        True
        >>> _ = back.apply(base)  # bit for bit what it was
    """
    delta = source if isinstance(source, Delta) else Delta.of(source)
    tensors: dict[str, torch.Tensor] = {}
    parameters = {}
    for name, change in delta.changes.items():
        values = change.values if dtype is None else change.values.to(dtype)
        try:
            _expect_values(delta.kind, change.dtype, values)
            parameters[name], stream = _entry(change)
        except (TypeError, ValueError) as error:
            raise type(error)(f"save_delta: {name}: {error}") from None
        tensors[f"{name}::values"] = values
        if stream is not None:
            tensors[f"{name}::index"] = stream
    _FILE.write(Path(path), {"kind": delta.kind, "parameters": parameters}, tensors)


def load_delta(path: str | os.PathLike[str]) -> Delta:
    """Read what :func:`save_delta` wrote; every claim of the file is checked.

    Args:
        path: the file. Nothing else is opened, and nothing unpickled.

    Returns:
        The delta, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged or of another version, or what it says does not fit; the
            message names file and parameter.
    """
    path = Path(path)
    manifest, tensors = _FILE.read(path)
    with naming(path):
        kind = manifest["kind"]
        if kind not in KINDS:
            raise ValueError(f"expected a kind of {' or '.join(KINDS)}, got {kind!r}")
        changes = {}
        for name, entry in manifest["parameters"].items():
            values, stream = (tensors.pop(f"{name}::{part}", None) for part in ("values", "index"))
            try:
                changes[name] = _change(entry, values, stream)
                _expect_values(kind, changes[name].dtype, changes[name].values)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from None
        if tensors:
            raise ValueError(f"expected tensors of its parameters only, got {min(tensors)}")
    return Delta(kind, changes)


def _expect_values(kind: str, dtype: torch.dtype, values: torch.Tensor) -> None:
    """Values of a dtype that a file keeps beside a weight's, all of them finite."""
    kept = (dtype,) if kind == "absolute" else (wide(dtype), torch.bfloat16)
    expect_dtype("delta", "values", values, kept, "in this kind of delta")
    if not bool(values.isfinite().all()):
        raise ValueError("expected finite values, got others")


# -- one parameter ---------------------------------------------------------------------------------


def _entry(change: Change) -> tuple[dict[str, Any], torch.Tensor | None]:
    """What the manifest says of a change, and the bytes of its index where it needs any."""
    if change.fingerprint is None:
        raise ValueError("expected a base that is known, got one that was not verified")
    entry = {
        "shape": list(change.shape),
        "dtype": name_of(change.dtype),
        "layout": change.layout,
        "rows": change.rows,
        "columns": change.columns,
        "fingerprint": change.fingerprint,
    }
    index, digest = change.index, change.index_sha256
    if index is not None and change.layout in DERIVED:
        digest = sha256_of(index.long())
        # Random entries are a function of the size, so memory that is never read will do.
        like = torch.empty(change.shape, dtype=change.dtype)
        if change.layout == "nonzero" or torch.equal(
            derived_index(like, "hashed", change.recipe), index.long().cpu()
        ):
            index = None
    if index is None:
        entry |= {"index": change.layout, "index_sha256": digest}
        if change.layout == "hashed":
            entry["recipe"] = dict(change.recipe)
        return entry, None
    k = matrix_of_shape(change.shape)[1]
    grid = _grid(change.shape, change.rows, change.columns)
    if index.numel() == grid:
        return {**entry, "index": "all"}, None
    numbers = numbers_of(index.cpu(), change.rows, change.columns, k)
    stream, low_bits = pack_numbers(numbers, grid)
    return {**entry, "index": "numbers", "low_bits": low_bits}, stream


def _change(entry: Any, values: torch.Tensor | None, stream: torch.Tensor | None) -> Change:
    """The inverse of :func:`_entry`; every claim is checked before memory of its size is taken."""
    how = entry.get("index") if isinstance(entry, dict) else None
    if how not in _MORE:
        raise ValueError(f"expected an index of {', '.join(_MORE)}, got {how!r}")
    expect_fields(entry, _FIELDS | _MORE[how])
    shape = entry["shape"]
    if not shape or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"expected a shape of sizes, got {shape}")
    n, k = matrix_of_shape(shape)
    if n * k >= 2**63:
        raise ValueError(f"expected fewer than 2^63 elements, got shape {shape}")
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(_DTYPES)}, got {entry['dtype']!r}")
    for key in ("fingerprint", "index_sha256"):
        if key in entry and not _DIGEST.fullmatch(entry[key]):
            raise ValueError(f"expected {key} of 64 hexadecimal digits, got {entry[key]!r}")
    if values is None or values.dim() != 1:
        raise ValueError(f"expected values of one dimension, got {values}")
    if (stream is not None) != (how == "numbers"):
        raise ValueError(f"expected bytes of an index beside numbers only, got index {how}")
    recipe = entry.get("recipe", {})
    if how == "hashed":
        expect_fields(recipe, {"seed": int, "count": int})
        if recipe["count"] != values.numel() or not -(2**63) <= recipe["seed"] < 2**63:
            raise ValueError(f"expected a seed and {values.numel()} entries, got {recipe}")
    rows, columns = entry["rows"], entry["columns"]
    index = None
    if how not in DERIVED:
        dtype = torch.int64 if n * k > torch.iinfo(torch.int32).max else torch.int32
        none = torch.empty(0, dtype=dtype)
        expect_rectangles("delta", "index", none, rows, columns, n, k)
        grid, count = _grid(shape, rows, columns), values.numel() // (rows * columns)
        if how == "all" and count != grid:
            raise ValueError(f"expected values of {grid} rectangles, got those of {count}")
        numbers = (
            torch.arange(count)
            if stream is None
            else unpack_numbers(stream, count, grid, entry["low_bits"])
        )
        index = starts_of(numbers, rows, columns, k).to(dtype)
    return Change(
        shape=tuple(shape),
        dtype=_DTYPES[entry["dtype"]],
        values=values,
        index=index,
        fingerprint=entry["fingerprint"],
        rows=rows,
        columns=columns,
        layout=entry["layout"] if index is not None else how,
        recipe=recipe,
        index_sha256=entry.get("index_sha256"),
    )


def _grid(shape: Sequence[int], rows: int, columns: int) -> int:
    """How many rectangles tile a weight."""
    n, k = matrix_of_shape(shape)
    return n // rows * (k // columns)


# -- ascending numbers in bytes --------------------------------------------------------------------


def pack_numbers(numbers: torch.Tensor, end: int) -> tuple[torch.Tensor, int]:
    r"""Ascending numbers in the code of Elias and Fano, and how many low bits it keeps of each.

    The lowest b bits stand as they are: b planes of one bit for each number. Of the rest a string
    of bits has, for the i-th number a, a one at place :math:`\lfloor a / 2^b \rfloor + i`. That is
    about :math:`\log_2(end / count) + 2` bits for each.

    Args:
        numbers: int64 of shape (count,), ascending, from 0 on.
        end: what they are below.

    Returns:
        uint8 bytes, their bits from the lowest on, each plane and the string in whole ones; and b,
        of which they are the fewest.

    Reference:
        Elias 1974, "Efficient Storage and Retrieval by Content and Address of Static Files";
        Fano 1971, "On the Number of Bits Required to Implement an Associative Memory".
    """
    count = numbers.numel()
    low_bits = min(range(63), key=lambda bits: sum(_sizes(count, end, bits)))
    planes = [_pack_bits((numbers >> bit & 1).to(torch.uint8)) for bit in range(low_bits)]
    string = torch.zeros(_length(count, end, low_bits), dtype=torch.uint8)
    string[(numbers >> low_bits) + torch.arange(count)] = 1
    return torch.cat([*planes, _pack_bits(string)]), low_bits


def unpack_numbers(stream: torch.Tensor, count: int, end: int, low_bits: int) -> torch.Tensor:
    """The inverse of :func:`pack_numbers`, int64.

    Raises:
        ValueError: the bytes are not those of so many numbers. Whether these ascend and are below
            ``end`` is left to who uses them.
    """
    if not 0 <= low_bits < 63:
        raise ValueError(f"expected low_bits from 0 to 62, got {low_bits}")
    planes, string = _sizes(count, end, low_bits)
    if stream.dtype is not torch.uint8 or tuple(stream.shape) != (planes + string,):
        got = f"{tuple(stream.shape)} of {name_of(stream.dtype)}"
        raise ValueError(f"expected an index of {planes + string} uint8 bytes, got {got}")
    # With what fills its last byte: a one there is none of the numbers.
    places = _bits(stream[planes:], 8 * string).nonzero()[:, 0]
    if places.numel() != count:
        raise ValueError(f"expected an index of {count} numbers, got {places.numel()}")
    numbers = (places - torch.arange(count)) << low_bits
    for bit, plane in enumerate(stream[:planes].view(low_bits, -1) if low_bits else ()):
        numbers |= _bits(plane, count).long() << bit
    return numbers


def _length(count: int, end: int, low_bits: int) -> int:
    """Bits of the string: a one for each number, and a zero for each 2^low_bits below the last."""
    return count + (max(end - 1, 0) >> low_bits)


def _sizes(count: int, end: int, low_bits: int) -> tuple[int, int]:
    """Bytes of the planes and of the string."""
    return low_bits * -(-count // 8), -(-_length(count, end, low_bits) // 8)


def _pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """uint8 zeros and ones, eight in a byte from the lowest bit on."""
    return torch.from_numpy(numpy.packbits(bits.numpy(), bitorder="little"))


def _bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of :func:`_pack_bits`."""
    return torch.from_numpy(numpy.unpackbits(packed.numpy(), count=count, bitorder="little"))
