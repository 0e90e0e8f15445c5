"""Samples of abs_row_sums and its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import (
    FLOAT32,
    Drawer,
    Precision,
    Reject,
    Sample,
    rejecter,
)

# N, K, R, whether there is a W, layout of u, large
_SHAPES = {
    "odd": (5, 7, 3, True, "contiguous", False),
    "without-w": (6, 9, 3, False, "contiguous", False),
    "rank-1": (17, 3, 1, False, "contiguous", False),
    "transposed": (9, 20, 4, True, "transposed", False),
    "no-rows": (0, 7, 2, True, "contiguous", False),
    "no-columns": (5, 0, 2, False, "contiguous", False),
    "tiles": (300, 450, 16, True, "contiguous", True),
    "tall": (700, 40, 4, False, "contiguous", True),
}


def _arguments(name: str, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """Small odd integers over a power of two, and W between the values that U V^T can have: exact
    in every dtype, so that no rounding decides a sign."""
    n, k, r, has_w, layout, _ = _SHAPES[name]
    draw = Drawer(name, precision, device)

    def signs(rows: int, columns: int) -> torch.Tensor:
        values = draw.base(rows, columns)
        return torch.where(values >= 0, 1, -1).to(values.dtype)

    u = signs(r, n).T if layout == "transposed" else signs(n, r)
    w = draw.base(n, k).clamp(-2, 2).round() + 0.5 if has_w else None
    return u, signs(k, r), w


def _gradient_arguments(
    name: str, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    u, v, w = _arguments(name, precision, device)
    grad = 1 + Drawer(f"grad {name}", precision, device).wide(u.shape[0], scale=0.25)
    return grad, u, v, w, [*need[:2], need[2] and w is not None]


def _samples() -> Iterator[Sample]:
    for name, (*_, large) in _SHAPES.items():
        yield Sample("abs_row_sums", name, partial(_arguments, name), large)


def _backward_samples() -> Iterator[Sample]:
    cases = [(name, (True,) * 3, name, large) for name, (*_, large) in _SHAPES.items()]
    cases += [("odd", (True, False, False), "odd-u", False)]
    cases += [("odd", (False, True, False), "odd-v", False)]
    for name, need, label, large in cases:
        build = partial(_gradient_arguments, name, need)
        yield Sample("abs_row_sums_backward", label, build, large)


def _shared_rejects(op: str, args: tuple[Any, ...], u: torch.Tensor) -> Iterator[Reject]:
    reject = rejecter(op, args)
    yield reject("u-1d", "u", u[0], ValueError, "shape (N, R)", "(3,)")
    yield reject("u-integer", "u", u.int(), TypeError, "dtype float32", "int32")
    yield reject("v-rank", "v", torch.ones(7, 2), ValueError, "shape (K, 3)", "(7, 2)")
    yield reject("v-dtype", "v", torch.ones(7, 3).half(), TypeError, "dtype float32", "float16")
    yield reject("w-shape", "w", torch.ones(5, 6), ValueError, "shape (5, 7)", "(5, 6)")


def _rejects() -> Iterator[Reject]:
    args = _arguments("odd", FLOAT32, torch.device("cpu"))
    yield from _shared_rejects("abs_row_sums", args, args[0])


def _backward_rejects() -> Iterator[Reject]:
    op = "abs_row_sums_backward"
    args = _gradient_arguments("odd", (True,) * 3, FLOAT32, torch.device("cpu"))
    yield from _shared_rejects(op, args, args[1])
    reject = rejecter(op, args)
    yield reject("grad-shape", "grad", torch.ones(4), ValueError, "shape (5,)", "(4,)")
    yield reject("w-absent", "w", None, TypeError, "type Tensor", "None")
    yield reject("need-short", "need", [True], ValueError, "three flags", "1")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "abs_row_sums": _samples,
    "abs_row_sums_backward": _backward_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "abs_row_sums": _rejects,
    "abs_row_sums_backward": _backward_rejects,
}
