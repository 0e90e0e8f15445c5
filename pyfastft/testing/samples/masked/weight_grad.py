"""Samples of masked_weight_grad."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import FLOAT32, Drawer, Precision, Reject, Sample, rejecter
from pyfastft.testing.samples.masked._rectangles import PARTS

# What of PARTS, the leading dimensions, layout of grad and x
_CASES = {
    **{name: (name, (11,), "contiguous") for name in PARTS if name != "vector"},
    "one-token": ("elements", (1,), "contiguous"),
    "no-tokens": ("blocks", (0,), "contiguous"),
    "leading": ("blocks", (2, 3), "contiguous"),
    "transposed": ("elements", (10,), "transposed"),
    "transposed-rows": ("rows", (10,), "transposed"),
    "sliced": ("columns", (9,), "sliced"),
    "few-of-many-tokens": ("few-of-many", (700,), "contiguous"),
    "many-of-many-tokens": ("many-of-many", (900,), "contiguous"),
    "many-of-many-transposed": ("many-of-many", (70,), "transposed"),
    "wide-blocks-tokens": ("wide-blocks", (500,), "sliced"),
}


def _laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "sliced":
        whole = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
        whole[..., ::2] = tensor
        return whole[..., ::2]
    return tensor


def _arguments(name: str, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    part_name, lead, layout = _CASES[name]
    part = PARTS[part_name]
    n, k = part.matrix()
    draw = Drawer(name, precision, device)
    grad = _laid_out(draw.base(*lead, n), layout)
    x = _laid_out(draw.base(*lead, k), layout)
    return grad, x, part.index(part_name, device), part.rows, part.columns


def _samples() -> Iterator[Sample]:
    for name, (part, *_) in _CASES.items():
        yield Sample("masked_weight_grad", name, partial(_arguments, name), PARTS[part].large)


def _rejects() -> Iterator[Reject]:
    op = "masked_weight_grad"
    args = _arguments("blocks", FLOAT32, torch.device("cpu"))
    reject = rejecter(op, args)
    grad, x, index = args[:3]
    yield reject("grad-integer", "grad", grad.int(), TypeError, "dtype float32", "int32")
    yield reject("x-half", "x", x.half(), TypeError, "dtype float32", "float16")
    yield reject("x-tokens", "x", x[1:], ValueError, "shape (11, K)", "(10, 20)")
    yield reject("index-float", "index", index.float(), TypeError, "dtype int32", "float32")
    yield reject("rows", "rows", 5, ValueError, "a divisor of 12", "5")
    yield reject("columns", "columns", 3, ValueError, "a divisor of 20", "3")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {"masked_weight_grad": _samples}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {"masked_weight_grad": _rejects}
