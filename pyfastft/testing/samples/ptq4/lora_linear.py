"""Samples of int4_lora_linear and its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pyfastft._op import REGISTRY, backend
from pyfastft.testing.samples._base import (
    FLOAT32,
    FLOAT64,
    Drawer,
    Precision,
    Reject,
    Sample,
    rejecter,
)
from pyfastft.testing.samples.ptq4._weights import Int4Shape, activation, weight, weight_rejects


@dataclass(frozen=True)
class Adapted:
    """A 4-bit layer with an adapter of rank r, which drops elements with probability p."""

    base: Int4Shape
    r: int
    p: float = 0.0


SHAPES = (
    Adapted(Int4Shape("odd", (2, 3), 5, 7, 4, zero="float"), 4, p=0.3),
    Adapted(Int4Shape("vector", (), 5, 16, 8, zero="uint8"), 2, p=0.1),
    Adapted(Int4Shape("one-row", (1,), 19, 24, 8, bias=False, codebook="nf4"), 3),
    Adapted(Int4Shape("per-channel", (7,), 8, 16, 64), 1, p=0.5),
    Adapted(Int4Shape("leading-dims", (2, 2, 3), 17, 32, 16, codebook="nf4", bias=False), 8, p=0.1),
    Adapted(Int4Shape("perm", (6,), 8, 16, 8, zero="uint8", perm=True), 4, p=0.2),
    Adapted(Int4Shape("slice", (9,), 18, 23, 8, half_scale=True, layout="slice"), 4, p=0.2),
    Adapted(Int4Shape("no-rows", (0,), 5, 8, 4), 4, p=0.3),
    Adapted(Int4Shape("no-inputs", (3,), 5, 0, 4), 4),
    Adapted(Int4Shape("several-tiles", (150,), 200, 256, 64, codebook="nf4", large=True), 16, 0.1),
    Adapted(Int4Shape("off-tile", (3, 37), 131, 101, 16, zero="uint8", large=True), 17, p=0.1),
)


def arguments(shape: Adapted, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """The forward's arguments."""
    base, r, p = shape.base, shape.r, shape.p
    codes, scale, zero, perm = weight(base, precision, device)
    draw = Drawer(f"adapter {base.name}", precision, device)
    x = activation(base, precision, device)
    lora_a = draw.adapter(r, base.k, scale=max(base.k, 1) ** -0.5)
    # Never zero, as B is at the start of training: gradients of A would vanish.
    lora_b = draw.adapter(base.n, r, scale=r**-0.5)
    bias = draw.base(base.n) if base.bias else None
    rng = torch.tensor([0x1234567890ABCDE, 1 << 33], device=device) if p else None
    operands = (x, codes, scale, zero, lora_a, lora_b, bias, draw.number(0.75), p, rng, perm, None)
    return *operands, base.group, base.codebook


def gradient_arguments(
    shape: Adapted, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    """The backward's, of the forward that the reference computes."""
    forward = arguments(shape, precision, device)
    x, codes, scale, zero, lora_a, lora_b, _, scaling, p, rng, perm, packed, *rest = forward
    with backend("reference"):
        xa = REGISTRY["int4_lora_linear"](*forward)[1]
    # Leaning towards the low-rank output, so that ds, a single sum, does not cancel: the naive
    # error of one element would be a matter of luck.
    values = Drawer(f"grad {shape.base.name}", FLOAT64, device).base(*x.shape[:-1], shape.base.n)
    values += xa.double() @ lora_b.double().T
    grad = values.to(precision.base)
    need = (*need[:2], need[2] and shape.base.zero == "float", *need[3:])
    x = x if need[1] or need[2] or need[3] else None
    xa = xa if need[4] or need[6] else None
    operands = (grad, x, codes, scale, zero, lora_a, lora_b, xa, scaling, p, rng, perm, packed)
    return *operands, *rest, list(need)


_ALL = (True,) * 7
_NEEDS = {
    "input": (True, False, False, False, False, False, False),
    "adapter": (False, False, False, True, True, False, False),
    "scale": (False, True, False, False, False, False, False),
    "lora": (True, False, False, True, True, False, False),
}


def _forward_samples() -> Iterator[Sample]:
    for shape in SHAPES:
        build = partial(arguments, shape)
        yield Sample("int4_lora_linear", shape.base.name, build, shape.base.large)


def _backward_samples() -> Iterator[Sample]:
    cases = [(shape, _ALL, shape.base.name) for shape in SHAPES]
    base = SHAPES[0]
    cases += [(base, need, f"{base.base.name}-{name}") for name, need in _NEEDS.items()]
    for shape, need, name in cases:
        build = partial(gradient_arguments, shape, need)
        yield Sample("int4_lora_linear_backward", name, build, shape.base.large)


def _operand_rejects(op: str, args: tuple[Any, ...]) -> Iterator[Reject]:
    """What both directions refuse."""
    reject = rejecter(op, args)
    at = REGISTRY[op].parameters.index
    names = ("codes", "scale", "zero", "perm", "lora_a", "lora_b")
    codes, scale, zero, perm, a, b = (args[at(name)] for name in names)
    yield from weight_rejects(reject, (codes, scale, zero, perm))

    yield reject("a-1d", "lora_a", a[0], ValueError, "shape (R, K)", "(7,)")
    yield reject("b-rank", "lora_b", b[:, :3], ValueError, "shape (5, 4)", "(5, 3)")
    yield reject("b-dtype", "lora_b", b.bfloat16(), TypeError, "dtype float32", "bfloat16")
    yield reject("p-above", "p", 1.5, ValueError, "a probability", "1.5")
    yield reject("rng-absent", "rng", None, TypeError, "type Tensor", "None")
    yield reject("packed-dtype", "packed", a, TypeError, "dtype uint8", "float32")


def _forward_rejects() -> Iterator[Reject]:
    op = "int4_lora_linear"
    args = arguments(SHAPES[0], FLOAT32, torch.device("cpu"))
    x, bias = args[0], args[6]
    yield from _operand_rejects(op, args)
    reject = rejecter(op, args)
    yield reject("x-columns", "x", x[..., :6], ValueError, "shape (..., 7)", "(2, 3, 6)")
    yield reject("bias-shape", "bias", bias[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("b-rows", "lora_b", args[5][:4], ValueError, "shape (4, 4)", "(5, 4)", at="codes")


def _backward_rejects() -> Iterator[Reject]:
    op = "int4_lora_linear_backward"
    args = gradient_arguments(SHAPES[0], _ALL, FLOAT32, torch.device("cpu"))
    grad, x, xa = args[0], args[1], args[7]
    yield from _operand_rejects(op, args)
    reject = rejecter(op, args)
    yield reject("grad-columns", "grad", grad[..., :4], ValueError, "shape (2, 3, 5)", "(2, 3, 4)")
    yield reject("x-absent", "x", None, TypeError, "type Tensor", "None")
    yield reject("x-columns", "x", x[..., :6], ValueError, "shape (2, 3, 7)", "(2, 3, 6)")
    yield reject("need-short", "need", [True] * 3, ValueError, "seven flags", "3")
    yield reject("xa-absent", "xa", None, TypeError, "type Tensor", "None")
    yield reject("xa-rank", "xa", xa[..., :3], ValueError, "shape (2, 3, 4)", "(2, 3, 3)")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "int4_lora_linear": _forward_samples,
    "int4_lora_linear_backward": _backward_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "int4_lora_linear": _forward_rejects,
    "int4_lora_linear_backward": _backward_rejects,
}
