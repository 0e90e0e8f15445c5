"""Samples of the prune family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pyfastft.ops.prune._pattern import grid_of, index_of_mask
from pyfastft.testing.samples._base import FLOAT32, Drawer, Precision, Reject, Sample, rejecter


@dataclass(frozen=True)
class Shape:
    """A case: sizes, how many of the blocks there are, and how x or the gradient lies."""

    name: str
    lead: tuple[int, ...]
    n: int
    k: int
    block: tuple[int, int]
    density: float
    bias: bool = True
    layout: str = "contiguous"
    large: bool = False


SHAPES = (
    Shape("ragged-leading", (2, 3), 5, 7, (2, 3), 0.5),
    Shape("one-row", (1,), 37, 40, (16, 16), 0.5),
    Shape("few-rows-wide", (3,), 70, 50, (16, 64), 0.5, False),
    Shape("tall", (17,), 40, 48, (32, 16), 0.4, True, "transposed"),
    Shape("odd-blocks", (20,), 21, 25, (7, 5), 0.5, False, "sliced"),
    Shape("no-blocks", (4,), 18, 20, (16, 16), 0.0),
    Shape("full", (5,), 32, 64, (16, 32), 1.0, False, "sliced"),
    Shape("no-tokens", (0,), 18, 20, (16, 16), 0.5),
    Shape("wide", (100,), 300, 200, (32, 32), 0.3, True, "contiguous", True),
    Shape("deep", (40,), 140, 1100, (64, 128), 0.8, False, "transposed", True),
)


def _index(shape: Shape, device: torch.device) -> tuple[torch.Tensor, int]:
    """The index of a mask that is drawn, and the number of its blocks."""
    grid = grid_of(shape.n, shape.k, *shape.block)
    generator = torch.Generator().manual_seed(sum(shape.name.encode()))
    mask = torch.rand(grid, generator=generator) < shape.density
    return index_of_mask(mask).to(device), int(mask.sum())


def _laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        whole = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
        whole[..., ::2] = tensor
        return whole[..., ::2]
    return tensor


def arguments(shape: Shape, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """The forward's arguments."""
    draw = Drawer(shape.name, precision, device)
    index, blocks = _index(shape, device)
    x = _laid_out(draw.base(*shape.lead, shape.k), shape.layout)
    values = draw.base(blocks, *shape.block)
    bias = draw.base(shape.n) if shape.bias else None
    return x, values, bias, index, shape.n


def gradient_arguments(
    shape: Shape, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    """The backward's."""
    x, values, _, index, _ = arguments(shape, precision, device)
    draw = Drawer(f"grad {shape.name}", precision, device)
    grad = _laid_out(draw.base(*shape.lead, shape.n), shape.layout)
    return grad, x if need[1] else None, values, index, shape.k, list(need)


_NEEDS = {
    "input": (True, False, False),
    "values": (False, True, False),
    "bias": (False, False, True),
}


def _forward_samples() -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample("block_sparse_linear", shape.name, partial(arguments, shape), shape.large)


def _backward_samples() -> Iterator[Sample]:
    cases = [(shape, (True,) * 3, shape.name) for shape in SHAPES]
    cases += [(SHAPES[0], need, f"{SHAPES[0].name}-{name}") for name, need in _NEEDS.items()]
    for shape, need, name in cases:
        build = partial(gradient_arguments, shape, need)
        yield Sample("block_sparse_linear_backward", name, build, shape.large)


def _forward_rejects() -> Iterator[Reject]:
    args = arguments(SHAPES[0], FLOAT32, torch.device("cpu"))
    x, values, bias, index, _ = args
    reject = rejecter("block_sparse_linear", args)
    size = index.shape[0]
    yield reject("x-scalar", "x", x[0, 0, 0], ValueError, "at least one dimension", "a scalar")
    yield reject("x-integer", "x", x.int(), TypeError, "dtype float32", "int32")
    yield reject("x-sparse", "x", x.to_sparse(), TypeError, "a dense layout", "torch.sparse_coo")
    yield reject("values-half", "values", values.half(), TypeError, "dtype float32", "float16")
    yield reject(
        "values-flat",
        "values",
        values[0],
        ValueError,
        "shape (blocks, rows, columns)",
        "(2, 3)",
    )
    yield reject("values-empty", "values", values[:, :0], ValueError, "at least 1 x 1", "0, 3)")
    yield reject("index-long", "index", index.long(), TypeError, "dtype int32", "int64")
    yield reject("index-short", "index", index[1:], ValueError, f"({size},)", f"({size - 1},)")
    yield reject("bias-shape", "bias", bias[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("bias-dtype", "bias", bias.double(), TypeError, "dtype float32", "float64")
    yield reject("n", "n", -1, ValueError, "at least 0", "-1")


def _backward_rejects() -> Iterator[Reject]:
    args = gradient_arguments(SHAPES[0], (True,) * 3, FLOAT32, torch.device("cpu"))
    grad, x, values, index = args[:4]
    reject = rejecter("block_sparse_linear_backward", args)
    size = index.shape[0]
    yield reject("grad-integer", "grad", grad.int(), TypeError, "dtype float32", "int32")
    yield reject("x-absent", "x", None, TypeError, "type Tensor", "None")
    yield reject("x-columns", "x", x[..., :6], ValueError, "shape (2, 3, 7)", "(2, 3, 6)")
    yield reject("x-dtype", "x", x.half(), TypeError, "dtype float32", "float16")
    yield reject("values-half", "values", values.half(), TypeError, "dtype float32", "float16")
    yield reject("index-short", "index", index[1:], ValueError, f"({size},)", f"({size - 1},)")
    yield reject("need-short", "need", [True] * 2, ValueError, "three flags", "2")
    yield reject("k", "k", -1, ValueError, "at least 0", "-1")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "block_sparse_linear": _forward_samples,
    "block_sparse_linear_backward": _backward_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "block_sparse_linear": _forward_rejects,
    "block_sparse_linear_backward": _backward_rejects,
}
