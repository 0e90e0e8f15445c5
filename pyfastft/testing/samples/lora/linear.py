"""Samples of lora_linear and its backward."""

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


@dataclass(frozen=True)
class LoraShape:
    """One layer's sizes, and what is special about its operands."""

    name: str
    leading: tuple[int, ...]
    n: int
    k: int
    r: int
    p: float = 0.0
    bias: bool = True
    layout: str = "contiguous"
    gate: str | None = None  # one for all rows ("ranks"), or one per row ("rows")
    base: bool = True
    large: bool = False


SHAPES = (
    LoraShape("odd", (2, 3), 5, 7, 4, p=0.3),
    LoraShape("vector", (), 5, 16, 2, p=0.1),
    LoraShape("one-row", (1,), 19, 24, 3, bias=False),
    LoraShape("rank-1", (7,), 8, 16, 1, p=0.5),
    LoraShape("rank-33", (5,), 40, 24, 33),
    LoraShape("one-column", (6,), 1, 1, 1, p=0.25),
    LoraShape("leading-dims", (2, 2, 3), 17, 32, 8, p=0.1, bias=False),
    LoraShape("permuted-dense", (6, 5), 12, 16, 4, p=0.2, layout="permuted"),
    LoraShape("slice", (9,), 18, 23, 4, p=0.2, layout="slice"),
    LoraShape("transposed-weight", (9,), 33, 40, 8, p=0.1, layout="transposed-weight"),
    LoraShape("expanded", (8,), 16, 16, 4, p=0.1, layout="expanded"),
    LoraShape("no-rows", (0,), 5, 7, 4, p=0.3),
    LoraShape("no-columns", (3,), 0, 7, 4),
    LoraShape("no-inputs", (3,), 5, 0, 4),
    LoraShape("all-dropped", (4,), 9, 16, 4, p=1.0),
    LoraShape("gated-ranks", (2, 5), 13, 16, 4, p=0.2, gate="ranks"),
    LoraShape("gated-rows", (3, 4), 21, 19, 6, p=0.1, gate="rows"),
    LoraShape("no-base", (6,), 12, 16, 4, p=0.1, base=False),
    LoraShape("gated-no-base", (21,), 130, 70, 40, gate="ranks", base=False, large=True),
    LoraShape("off-tile", (3, 37), 131, 101, 17, p=0.1, large=True),
    LoraShape("several-tiles", (150,), 200, 264, 16, p=0.1, large=True),
    LoraShape("gated-tiles", (70,), 300, 450, 16, p=0.1, gate="rows", large=True),
    LoraShape("deep", (33,), 40, 1000, 24, large=True),
    LoraShape("high-rank", (20,), 70, 96, 200, p=0.05, large=True),
)


def arguments(shape: LoraShape, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """The forward's arguments."""
    draw = Drawer(shape.name, precision, device)
    n, k, r = shape.n, shape.k, shape.r
    if shape.layout == "permuted":
        x = draw.base(*shape.leading[::-1], k).transpose(0, 1)
    elif shape.layout == "slice":
        x = draw.base(*shape.leading, 2 * k + 3)[..., 3::2]
    elif shape.layout == "expanded":
        x = draw.base(1, k).expand(*shape.leading, k)
    else:
        x = draw.base(*shape.leading, k)
    scale = max(k, 1) ** -0.5
    weight = (
        draw.base(k, n, scale=scale).T
        if shape.layout == "transposed-weight"
        else draw.base(n, k, scale=scale)
    )
    lora_a = draw.adapter(r, k, scale=scale)
    # Never zero, as B is at the start of training: gradients of A would vanish.
    lora_b = draw.adapter(n, r, scale=r**-0.5)
    bias = draw.base(n) if shape.bias else None
    rng = torch.tensor([0x1234567890ABCDE, 1 << 33], device=device) if shape.p else None
    gate = None
    if shape.gate is not None:
        # Positive, so that sums over ranks do not cancel more than without it.
        size = (r,) if shape.gate == "ranks" else (*shape.leading, r)
        gate = 0.5 + draw.adapter(*size).abs()
    scaling = draw.number(0.75)
    base = weight if shape.base else None
    return x, base, lora_a, lora_b, bias, scaling, shape.p, rng, gate, None, None


def gradient_arguments(
    shape: LoraShape, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    """The backward's, of the forward that the reference computes."""
    forward = arguments(shape, precision, device)
    x, weight, lora_a, lora_b, _, scaling, p, rng, gate, packed, packed_dx = forward
    with backend("reference"):
        xa = REGISTRY["lora_linear"](*forward)[1]
    size = (*x.shape[:-1], shape.n)
    if shape.layout == "expanded":
        grad = torch.ones((), dtype=precision.base, device=device).expand(size)
    else:
        # Leaning towards the low-rank output, so that ds, a single sum, does not cancel: the
        # naive error of one element would be a matter of luck.
        values = Drawer(f"grad {shape.name}", FLOAT64, device).base(*size)
        values += xa.double() @ lora_b.double().T
        grad = values.to(precision.base)
    need = (*need[:1], need[1] and weight is not None, *need[2:6], need[6] and gate is not None)
    if not (need[1] or need[2]):
        x = None
    if not (need[3] or need[5] or need[6]):
        xa = None
    operands = (grad, x, weight, lora_a, lora_b, xa, scaling, p, rng, gate, packed, packed_dx)
    return *operands, list(need)


_ALL = (True,) * 7
_NEEDS = {
    "input": (True, False, False, False, False, False, False),
    "adapter": (False, False, True, True, False, False, False),
    "b-only": (False, False, False, True, False, False, False),
    "scaling": (False, False, False, False, False, True, False),
    "lora": (True, False, True, True, False, False, False),
}


def _lora_linear_samples() -> Iterator[Sample]:
    for shape in SHAPES:
        yield Sample(
            "lora_linear",
            shape.name,
            partial(arguments, shape),
            shape.large,
        )


def _lora_linear_backward_samples() -> Iterator[Sample]:
    cases = [(shape, _ALL, shape.name) for shape in SHAPES]
    base = SHAPES[0]
    cases += [(base, need, f"{base.name}-{name}") for name, need in _NEEDS.items()]
    for shape, need, name in cases:
        yield Sample(
            "lora_linear_backward",
            name,
            partial(gradient_arguments, shape, need),
            shape.large,
        )


def _lora_operand_rejects(op: str, args: tuple[Any, ...]) -> Iterator[Reject]:
    """What both directions refuse."""
    reject = rejecter(op, args)
    at = REGISTRY[op].parameters.index
    a, b, weight = (args[at(name)] for name in ("lora_a", "lora_b", "weight"))
    yield reject("weight-1d", "weight", weight[0], ValueError, "shape (N, K)", "(7,)")
    yield reject("weight-dtype", "weight", weight.half(), TypeError, "dtype float32", "float16")
    yield reject("weight-device", "weight", weight.to("meta"), ValueError, "device cpu", "meta")
    yield reject("weight-sparse", "weight", weight.to_sparse(), TypeError, "a dense", "sparse_coo")
    yield reject("weight-list", "weight", [1.0], TypeError, "type Tensor", "list")
    yield reject("a-columns", "lora_a", a[:, :6], ValueError, "shape (R, 7)", "(4, 6)")
    yield reject("a-no-rank", "lora_a", a[:0], ValueError, "rank at least 1", "0")
    yield reject("a-dtype", "lora_a", a.half(), TypeError, "dtype float32", "float16")
    yield reject("b-rank", "lora_b", b[:, :3], ValueError, "shape (5, 4)", "(5, 3)")
    yield reject("b-dtype", "lora_b", b.bfloat16(), TypeError, "dtype float32", "bfloat16")
    two = torch.ones(2)
    yield reject("scaling-two", "scaling", two, ValueError, "one element", "(2,)")
    yield reject("scaling-dtype", "scaling", two[0].half(), TypeError, "dtype float32", "float16")
    yield reject("p-above", "p", 1.5, ValueError, "a probability", "1.5")
    yield reject("p-nan", "p", float("nan"), ValueError, "a probability", "nan")
    yield reject("rng-absent", "rng", None, TypeError, "type Tensor", "None")
    yield reject("rng-shape", "rng", torch.zeros(3).long(), ValueError, "shape (2,)", "(3,)")
    yield reject("rng-dtype", "rng", torch.zeros(2).int(), TypeError, "dtype int64", "int32")
    gate = torch.ones(3)
    yield reject("gate-shape", "gate", gate, ValueError, "shape (4,) or (2, 3, 4)", "(3,)")
    yield reject("gate-dtype", "gate", torch.ones(4).half(), TypeError, "dtype float32", "float16")
    yield reject("packed-dtype", "packed", gate, TypeError, "dtype uint8", "float32")
    square = torch.zeros(2, 2, dtype=torch.uint8)
    yield reject("packed-2d", "packed_dx", square, ValueError, "shape (bytes,)", "(2, 2)")


def _lora_linear_rejects() -> Iterator[Reject]:
    op = "lora_linear"
    args = arguments(SHAPES[0], FLOAT32, torch.device("cpu"))
    x, bias = args[0], args[4]
    yield from _lora_operand_rejects(op, args)
    reject = rejecter(op, args)
    yield reject("x-columns", "x", x[..., :6], ValueError, "shape (..., 7)", "(2, 3, 6)")
    yield reject("x-scalar", "x", x[0, 0, 0], ValueError, "at least one dimension", "a scalar")
    yield reject("x-integer", "x", x.int(), TypeError, "dtype float32", "int32")
    yield reject("x-complex", "x", x.cfloat(), TypeError, "dtype float32", "complex64")
    yield reject("bias-shape", "bias", bias[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("bias-dtype", "bias", bias.double(), TypeError, "dtype float32", "float64")


def _lora_linear_backward_rejects() -> Iterator[Reject]:
    op = "lora_linear_backward"
    args = gradient_arguments(SHAPES[0], _ALL, FLOAT32, torch.device("cpu"))
    grad, x, xa = args[0], args[1], args[5]
    yield from _lora_operand_rejects(op, args)
    reject = rejecter(op, args)
    yield reject("grad-columns", "grad", grad[..., :4], ValueError, "shape (2, 3, 5)", "(2, 3, 4)")
    yield reject("x-absent", "x", None, TypeError, "type Tensor", "None")
    yield reject("x-rows", "x", x[:1], ValueError, "shape (2, 3, 7)", "(1, 3, 7)")
    yield reject("xa-absent", "xa", None, TypeError, "type Tensor", "None")
    yield reject("xa-rank", "xa", xa[..., :3], ValueError, "shape (2, 3, 4)", "(2, 3, 3)")
    yield reject("xa-dtype", "xa", xa.half(), TypeError, "dtype float32", "float16")
    yield reject("weight-absent", "weight", None, TypeError, "type Tensor", "None")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "lora_linear": _lora_linear_samples,
    "lora_linear_backward": _lora_linear_backward_samples,
}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "lora_linear": _lora_linear_rejects,
    "lora_linear_backward": _lora_linear_backward_rejects,
}
