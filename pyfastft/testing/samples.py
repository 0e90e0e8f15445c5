"""Sample arguments of every op, and arguments that every op must reject.

Per op the samples hold one row, sizes off every tile, rank 1, permuted-dense inputs, a
non-contiguous slice, no elements, and leading batch dimensions. Tests and benchmarks enumerate
them through :func:`samples` and :func:`rejects`; a new op adds its builder here and nothing
anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pyfastft._op import REGISTRY, backend


@dataclass(frozen=True)
class Precision:
    """The dtypes of one run of an op: the base's, and the adapter's where they differ."""

    base: torch.dtype
    adapter: torch.dtype

    def __str__(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        base, adapter = (short.get(d, "fp64") for d in (self.base, self.adapter))
        return base if base == adapter else f"{base}-{adapter}"


PRECISIONS = (
    Precision(torch.float32, torch.float32),
    Precision(torch.bfloat16, torch.bfloat16),
    Precision(torch.float16, torch.float16),
    Precision(torch.bfloat16, torch.float32),
    Precision(torch.float16, torch.float32),
)
FLOAT64 = Precision(torch.float64, torch.float64)
FLOAT32 = PRECISIONS[0]


@dataclass(frozen=True)
class Sample:
    """Arguments of an op: ``build(precision, device)`` makes them, the same at every call."""

    op: str
    name: str
    build: Callable[[Precision, torch.device], tuple[Any, ...]]
    large: bool = False  # too large for Triton's interpreter

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Reject:
    """Arguments that the op must refuse, and what its message must say."""

    op: str
    name: str
    args: tuple[Any, ...]
    error: type[Exception]
    argument: str
    expected: str
    got: str


def upcast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments in float64: what the truth is computed from."""
    return tuple(
        arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


def samples(op: str) -> Iterator[Sample]:
    """All samples of an op."""
    return iter(_SAMPLES[op]())


def rejects(op: str) -> Iterator[Reject]:
    """All arguments that an op must reject."""
    return iter(_REJECTS[op]())


# -- lora ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LoraShape:
    name: str
    leading: tuple[int, ...]
    n: int
    k: int
    r: int
    p: float = 0.0
    bias: bool = True
    layout: str = "contiguous"
    large: bool = False


_LORA_SHAPES = (
    _LoraShape("odd", (2, 3), 5, 7, 4, p=0.3),
    _LoraShape("vector", (), 5, 16, 2, p=0.1),
    _LoraShape("one-row", (1,), 19, 24, 3, bias=False),
    _LoraShape("rank-1", (7,), 8, 16, 1, p=0.5),
    _LoraShape("rank-33", (5,), 40, 24, 33),
    _LoraShape("one-column", (6,), 1, 1, 1, p=0.25),
    _LoraShape("leading-dims", (2, 2, 3), 17, 32, 8, p=0.1, bias=False),
    _LoraShape("permuted-dense", (6, 5), 12, 16, 4, p=0.2, layout="permuted"),
    _LoraShape("slice", (9,), 18, 23, 4, p=0.2, layout="slice"),
    _LoraShape("transposed-weight", (9,), 33, 40, 8, p=0.1, layout="transposed-weight"),
    _LoraShape("expanded", (8,), 16, 16, 4, p=0.1, layout="expanded"),
    _LoraShape("no-rows", (0,), 5, 7, 4, p=0.3),
    _LoraShape("no-columns", (3,), 0, 7, 4),
    _LoraShape("no-inputs", (3,), 5, 0, 4),
    _LoraShape("all-dropped", (4,), 9, 16, 4, p=1.0),
    _LoraShape("off-tile", (3, 37), 131, 101, 17, p=0.1, large=True),
    _LoraShape("several-tiles", (150,), 200, 264, 16, p=0.1, large=True),
    _LoraShape("deep", (33,), 40, 1000, 24, large=True),
    _LoraShape("high-rank", (20,), 70, 96, 200, p=0.05, large=True),
)


def _lora_arguments(
    shape: _LoraShape, precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(sum(shape.name.encode()))

    # Drawn in float64 and rounded, so that every precision sees the same numbers.
    def draw(*size: int, dtype: torch.dtype = precision.base, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64) * scale
        return values.to(device=device, dtype=dtype)

    n, k, r = shape.n, shape.k, shape.r
    if shape.layout == "permuted":
        x = draw(*shape.leading[::-1], k).transpose(0, 1)
    elif shape.layout == "slice":
        x = draw(*shape.leading, 2 * k + 3)[..., 3::2]
    elif shape.layout == "expanded":
        x = draw(1, k).expand(*shape.leading, k)
    else:
        x = draw(*shape.leading, k)
    scale = max(k, 1) ** -0.5
    weight = (
        draw(k, n, scale=scale).T
        if shape.layout == "transposed-weight"
        else draw(n, k, scale=scale)
    )
    lora_a = draw(r, k, dtype=precision.adapter, scale=scale)
    # Never zero, as B is at the start of training: gradients of A would vanish.
    lora_b = draw(n, r, dtype=precision.adapter, scale=r**-0.5)
    bias = draw(n) if shape.bias else None
    wide = torch.float64 if precision.base is torch.float64 else torch.float32
    scaling = torch.tensor(0.75, dtype=wide, device=device)
    rng = torch.tensor([0x1234567890ABCDE, 1 << 33], device=device) if shape.p else None
    return x, weight, lora_a, lora_b, bias, scaling, shape.p, rng


def _lora_gradient_arguments(
    shape: _LoraShape, need: tuple[bool, ...], precision: Precision, device: torch.device
) -> tuple[Any, ...]:
    forward = _lora_arguments(shape, precision, device)
    x, weight, lora_a, lora_b, _, scaling, p, rng = forward
    with backend("reference"):
        xa = REGISTRY["lora_linear"](*forward)[1]
    generator = torch.Generator().manual_seed(1)
    size = (*x.shape[:-1], shape.n)
    if shape.layout == "expanded":
        grad = torch.ones((), dtype=precision.base, device=device).expand(size)
    else:
        # Leaning towards the low-rank output, so that ds, a single sum, does not cancel: the
        # naive error of one element would be a matter of luck.
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        values += (xa.double() @ lora_b.double().T).cpu()
        grad = values.to(device=device, dtype=precision.base)
    if not (need[1] or need[2]):
        x = None
    if not (need[3] or need[5]):
        xa = None
    return grad, x, weight, lora_a, lora_b, xa, scaling, p, rng, list(need)


_ALL = (True,) * 6
_NEEDS = {
    "input": (True, False, False, False, False, False),
    "adapter": (False, False, True, True, False, False),
    "b-only": (False, False, False, True, False, False),
    "scaling": (False, False, False, False, False, True),
    "lora": (True, False, True, True, False, False),
}


def _lora_linear_samples() -> Iterator[Sample]:
    for shape in _LORA_SHAPES:
        yield Sample(
            "lora_linear",
            shape.name,
            partial(_lora_arguments, shape),
            shape.large,
        )


def _lora_linear_backward_samples() -> Iterator[Sample]:
    cases = [(shape, _ALL, shape.name) for shape in _LORA_SHAPES]
    base = _LORA_SHAPES[0]
    cases += [(base, need, f"{base.name}-{name}") for name, need in _NEEDS.items()]
    for shape, need, name in cases:
        yield Sample(
            "lora_linear_backward",
            name,
            partial(_lora_gradient_arguments, shape, need),
            shape.large,
        )


def _changed(args: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*args[:position], value, *args[position + 1 :])


def _rejecter(op: str, args: tuple[Any, ...]) -> Callable[..., Reject]:
    """Builds rejects of good arguments with one of them replaced."""
    names = REGISTRY[op].parameters

    def reject(
        name: str, argument: str, value: Any, error: type[Exception], expected: str, got: str
    ) -> Reject:
        bad = _changed(args, names.index(argument), value)
        return Reject(op, name, bad, error, argument, expected, got)

    return reject


def _lora_operand_rejects(op: str, args: tuple[Any, ...]) -> Iterator[Reject]:
    """What both directions refuse."""
    reject = _rejecter(op, args)
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


def _lora_linear_rejects() -> Iterator[Reject]:
    op = "lora_linear"
    args = _lora_arguments(_LORA_SHAPES[0], FLOAT32, torch.device("cpu"))
    x, bias = args[0], args[4]
    yield from _lora_operand_rejects(op, args)
    reject = _rejecter(op, args)
    yield reject("x-columns", "x", x[..., :6], ValueError, "shape (..., 7)", "(2, 3, 6)")
    yield reject("x-scalar", "x", x[0, 0, 0], ValueError, "at least one dimension", "a scalar")
    yield reject("x-integer", "x", x.int(), TypeError, "dtype float32", "int32")
    yield reject("x-complex", "x", x.cfloat(), TypeError, "dtype float32", "complex64")
    yield reject("bias-shape", "bias", bias[:4], ValueError, "shape (5,)", "(4,)")
    yield reject("bias-dtype", "bias", bias.double(), TypeError, "dtype float32", "float64")


def _lora_linear_backward_rejects() -> Iterator[Reject]:
    op = "lora_linear_backward"
    args = _lora_gradient_arguments(_LORA_SHAPES[0], _ALL, FLOAT32, torch.device("cpu"))
    grad, x, xa = args[0], args[1], args[5]
    yield from _lora_operand_rejects(op, args)
    reject = _rejecter(op, args)
    yield reject("grad-columns", "grad", grad[..., :4], ValueError, "shape (2, 3, 5)", "(2, 3, 4)")
    yield reject("x-absent", "x", None, TypeError, "type Tensor", "None")
    yield reject("x-rows", "x", x[:1], ValueError, "shape (2, 3, 7)", "(1, 3, 7)")
    yield reject("xa-absent", "xa", None, TypeError, "type Tensor", "None")
    yield reject("xa-rank", "xa", xa[..., :3], ValueError, "shape (2, 3, 4)", "(2, 3, 3)")
    yield reject("xa-dtype", "xa", xa.half(), TypeError, "dtype float32", "float16")


_SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {
    "lora_linear": _lora_linear_samples,
    "lora_linear_backward": _lora_linear_backward_samples,
}
_REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {
    "lora_linear": _lora_linear_rejects,
    "lora_linear_backward": _lora_linear_backward_rejects,
}
