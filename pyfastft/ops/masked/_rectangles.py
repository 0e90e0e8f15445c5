"""The trained part of a weight, and its checks.

A weight of shape (N, ...) counts as a matrix (N, K), a vector as one row. Its trained part is
equal rectangles of ``rows`` x ``columns`` on a grid of that size, given by ``index``: the flat
offsets of their first elements, ascending. Their values stand rectangle by rectangle, each row
after row. Elements are rectangles of 1 x 1, rows of 1 x K, columns of N x 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from pyfastft._check import FLOATS, expect_dense, expect_dtype, expect_shape, reject

INDEX_DTYPES = (torch.int32, torch.int64)
# Indices that were found to fit, and where: reading one back from a device waits for all that was
# launched before, and a training step has the same ones every time.
_checked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What values, state and gradients are kept in beside a weight."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def matrix_of(weight: torch.Tensor) -> tuple[int, int]:
    """N and K of a weight."""
    return matrix_of_shape(weight.shape)


def matrix_of_shape(shape: Sequence[int]) -> tuple[int, int]:
    """N and K of a weight of this shape."""
    n, rest = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
    k = 1
    for size in rest:
        k *= size
    return n, k


def expect_weight(op: str, arg: str, weight: torch.Tensor, device: torch.device | None) -> None:
    """A dense C-contiguous tensor of at least one dimension."""
    expect_dense(op, device, **{arg: weight})
    expect_dtype(op, arg, weight, FLOATS)
    if weight.dim() < 1:
        reject(op, arg, "shape (N, ...)", tuple(weight.shape))
    if not weight.is_contiguous():
        because = "to be addressed by flat offsets"
        reject(op, arg, "a C-contiguous layout", f"strides {weight.stride()}", because=because)


def expect_rectangles(
    op: str, arg: str, index: torch.Tensor, rows: int, columns: int, n: int, k: int
) -> int:
    """The number of values of such rectangles in an (N, K) matrix; their offsets are not read."""
    expect_dtype(op, arg, index, INDEX_DTYPES)
    expect_shape(op, arg, index, ("count",))
    for name, size, whole in (("rows", rows, n), ("columns", columns, k)):
        if size < 1:
            reject(op, name, "at least 1", size)
        if whole % size:
            reject(op, name, f"a divisor of {whole}", size, because="to tile the weight")
    if index.dtype is torch.int32 and n * k > 2**31:
        reject(op, arg, "dtype int64", "int32", because=f"to address {n * k} elements")
    return index.shape[0] * rows * columns


def offsets_of(index: torch.Tensor, rows: int, columns: int, k: int) -> torch.Tensor:
    """The flat offset of every value, int64."""
    first = index.long()[:, None, None]
    down = k * torch.arange(rows, device=index.device)[None, :, None]
    across = torch.arange(columns, device=index.device)[None, None, :]
    return (first + down + across).reshape(-1)


def starts_of(numbers: torch.Tensor, rows: int, columns: int, k: int) -> torch.Tensor:
    """The flat offsets of rectangles given by their numbers along the rows of their grid."""
    across = max(k // columns, 1)
    return numbers // across * rows * k + numbers % across * columns


def numbers_of(index: torch.Tensor, rows: int, columns: int, k: int) -> torch.Tensor:
    """The inverse of :func:`starts_of`, int64; both keep the order."""
    first, wide_k = index.long(), max(k, 1)
    return first // wide_k // rows * (k // columns) + first % wide_k // columns


def check_index(
    op: str, index: torch.Tensor, rows: int, columns: int, n: int, k: int, arg: str = "index"
) -> None:
    """ValueError unless the offsets ascend and all rectangles lie on their grid within (N, K)."""
    if not index.numel():
        return
    first = index.long()
    if bool((first[1:] <= first[:-1]).any()):
        reject(op, arg, "ascending offsets", "an offset that is not above the one before")
    if int(first[0]) < 0 or int(first[-1]) >= n * k:
        got = f"offsets from {int(first[0])} to {int(first[-1])}"
        reject(op, arg, f"offsets within {n * k} elements", got)
    if rows * columns == 1:
        return
    off = (first // k % rows != 0) | (first % k % columns != 0)
    if bool(off.any()):
        got = f"offset {int(first[off][0])}"
        reject(op, arg, f"offsets on the grid of {rows} x {columns}", got)


def expect_index(
    op: str, index: torch.Tensor, rows: int, columns: int, n: int, k: int, arg: str = "index"
) -> None:
    """:func:`check_index`, once for each index that has not changed since."""
    fits = (index._version, index.data_ptr(), rows, columns, n, k)
    if _checked.get(index) != fits:
        check_index(op, index, rows, columns, n, k, arg)
        _checked[index] = fits


def expect_places(index: torch.Tensor, kept: torch.Tensor) -> None:
    """ValueError unless the places that masked_merge keeps ascend within the index."""
    if not kept.numel():
        return
    ascend = bool((kept[1:] > kept[:-1]).all())
    if not ascend or int(kept[0]) < 0 or int(kept[-1]) >= index.shape[0]:
        got = kept.tolist()[:8]
        reject("masked_merge", "kept", f"ascending places within {index.shape[0]}", got)


def reject_grown() -> NoReturn:
    """The ValueError of lists that masked_merge cannot merge."""
    reject("masked_merge", "grown", "ascending entries, none of those kept", "another")
