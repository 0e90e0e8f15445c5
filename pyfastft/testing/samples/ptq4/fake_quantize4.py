"""Samples of fake_quantize4 and its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import FLOAT32, Drawer, Precision, Reject, Sample, rejecter


@dataclass(frozen=True)
class RangeShape:
    """Activations, and what is special about them."""

    name: str
    leading: tuple[int, ...]
    k: int
    group: int | None = None  # one range for all, or one for each group
    perm: bool = False
    layout: str = "contiguous"
    large: bool = False


# None has fewer than 400 elements: a gradient straight through a rounding is not what the finite
# differences of the tests for tiny samples see.
SHAPES = (
    RangeShape("odd", (2, 7), 37, 5),
    RangeShape("vector", (), 431),
    RangeShape("one-row", (1,), 500, 64),
    RangeShape("one-column", (420,), 1),
    RangeShape("perm", (23,), 19, 4, perm=True),
    RangeShape("perm-one-range", (23,), 19, perm=True),
    RangeShape("permuted-dense", (16, 5), 12, 6, layout="permuted"),
    RangeShape("slice", (19,), 23, layout="slice"),
    RangeShape("expanded", (14,), 32, 8, layout="expanded"),
    RangeShape("no-rows", (0,), 8, 4),
    RangeShape("no-columns", (3,), 0),
    RangeShape("tiles", (130,), 300, 128, large=True),
    RangeShape("tall", (1000,), 40, large=True),
)


def learned_range(
    name: str, groups: int, precision: Precision, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and zeros of which some are outside 0..15, for standard normal activations."""
    draw = Drawer(f"range {name}", precision, device)
    scale = 0.1 + 0.05 * draw.wide(groups).abs()
    return scale, 7.3 + 5 * draw.wide(groups)


def arguments(shape: RangeShape, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """The forward's arguments."""
    draw, k = Drawer(shape.name, precision, device), shape.k
    if shape.layout == "permuted":
        x = draw.base(*shape.leading[::-1], k).transpose(0, 1)
    elif shape.layout == "slice":
        x = draw.base(*shape.leading, 2 * k + 3)[..., 3::2]
    elif shape.layout == "expanded":
        x = draw.base(1, k).expand(*shape.leading, k)
    else:
        x = draw.base(*shape.leading, k)
    groups = 1 if shape.group is None else -(-k // shape.group)
    perm = None
    if shape.perm:
        perm = torch.randperm(k, generator=draw.generator).int().to(device)
    scale, zero = learned_range(shape.name, groups, precision, device)
    return x, scale, zero, perm, shape.group or max(k, 1)


def gradient_arguments(
    shape: RangeShape, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    """The backward's: gradients of the signs of x, so that sums do not cancel."""
    x, *rest = arguments(shape, precision, device)
    grad = Drawer(f"grad {shape.name}", precision, device).base(*x.shape).abs() * x.sign()
    return grad, x, *rest, list(need)


_ALL = (True,) * 3
_NEEDS = {"x": (True, False, False), "scale": (False, True, False), "zero": (False, False, True)}


def _forward_samples() -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample("fake_quantize4", shape.name, partial(arguments, shape), shape.large)


def _backward_samples() -> Iterator[Sample]:
    cases = [(shape, _ALL, shape.name) for shape in SHAPES]
    cases += [(SHAPES[0], need, f"{SHAPES[0].name}-{name}") for name, need in _NEEDS.items()]
    for shape, need, name in cases:
        build = partial(gradient_arguments, shape, need)
        yield Sample("fake_quantize4_backward", name, build, shape.large)


def range_rejects(
    reject: Callable[..., Reject], x_scale: torch.Tensor, x_zero: torch.Tensor
) -> Iterator[Reject]:
    """What is refused of two ranges of groups of 4 of K = 7."""
    three = torch.ones(3)
    yield reject("x-scale-groups", "x_scale", three, ValueError, "shape (1,) or (2,)", "(3,)")
    yield reject("x-scale-scalar", "x_scale", x_scale[0], ValueError, "shape (1,) or (2,)", "()")
    yield reject("x-scale-dtype", "x_scale", x_scale.half(), TypeError, "dtype float32", "float16")
    yield reject("x-scale-list", "x_scale", [1.0], TypeError, "type Tensor", "list")
    yield reject("x-zero-groups", "x_zero", x_zero[:1], ValueError, "shape (2,)", "(1,)")
    yield reject("x-zero-dtype", "x_zero", x_zero.byte(), TypeError, "dtype float32", "uint8")


def _shared_rejects(op: str, args: tuple[Any, ...]) -> Iterator[Reject]:
    reject = rejecter(op, args)
    x, x_scale, x_zero = args[-6:-3] if op.endswith("_backward") else args[:3]
    yield from range_rejects(reject, x_scale, x_zero)
    yield reject("x-integer", "x", x.int(), TypeError, "dtype float32", "int32")
    yield reject("x-scalar", "x", x[0, 0, 0], ValueError, "at least one dimension", "a scalar")
    yield reject("group-size-0", "group_size", 0, ValueError, "at least 1", "0")
    perm = torch.arange(7)
    yield reject("perm-dtype", "perm", perm, TypeError, "dtype int32", "int64")
    yield reject("perm-short", "perm", perm[:6].int(), ValueError, "shape (7,)", "(6,)")


_REJECTED = RangeShape("rejected", (2, 3), 7, 4)


def _rejects() -> Iterator[Reject]:
    args = arguments(_REJECTED, FLOAT32, torch.device("cpu"))
    yield from _shared_rejects("fake_quantize4", args)


def _backward_rejects() -> Iterator[Reject]:
    op = "fake_quantize4_backward"
    args = gradient_arguments(_REJECTED, _ALL, FLOAT32, torch.device("cpu"))
    yield from _shared_rejects(op, args)
    reject, grad = rejecter(op, args), args[0]
    yield reject("grad-shape", "grad", grad[..., :6], ValueError, "shape (2, 3, 7)", "(2, 3, 6)")
    yield reject("grad-dtype", "grad", grad.half(), TypeError, "dtype float32", "float16")
    yield reject("need-short", "need", [True], ValueError, "three flags", "1")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "fake_quantize4": _forward_samples,
    "fake_quantize4_backward": _backward_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "fake_quantize4": _rejects,
    "fake_quantize4_backward": _backward_rejects,
}
