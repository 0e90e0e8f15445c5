"""What samples and rejects are, and what their builders share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyfastft._op import REGISTRY, Op


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

    def one(arg: Any) -> Any:
        return arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg

    return tuple([one(a) for a in arg] if isinstance(arg, list) else one(arg) for arg in args)


def flat(values: Any) -> tuple[Any, ...]:
    """An op's outputs, those of a list among them each by itself."""
    values = values if isinstance(values, tuple) else (values,)
    return tuple(one for v in values for one in (v if isinstance(v, list) else (v,)))


def outputs_of(op: Op, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """What an op gives; of one that mutates, what it wrote into copies of its arguments."""
    if not op.mutates:
        return flat(op(*args))
    args = copy.deepcopy(args)
    op(*args)
    return tuple(op.written(args))


class Drawer:
    """Draws operands in float64 and rounds them, so that every precision sees the same numbers."""

    def __init__(self, name: str, precision: Precision, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(sum(name.encode()))
        self.precision, self.device = precision, device

    def base(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        """Of the base's dtype."""
        return self._draw(size, scale).to(device=self.device, dtype=self.precision.base)

    def adapter(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        """Of the adapter's dtype."""
        return self._draw(size, scale).to(device=self.device, dtype=self.precision.adapter)

    def wide(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        """float32, float64 beside float64."""
        double = self.precision.base is torch.float64
        dtype = torch.float64 if double else torch.float32
        return self._draw(size, scale).to(device=self.device, dtype=dtype)

    def number(self, value: float) -> torch.Tensor:
        """One float32, float64 beside float64."""
        return self.wide(1).reshape(()).fill_(value)

    def _draw(self, size: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64) * scale


def changed(args: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    """The arguments with one of them replaced."""
    return (*args[:position], value, *args[position + 1 :])


def rejecter(op: str, args: tuple[Any, ...]) -> Callable[..., Reject]:
    """Builds rejects of good arguments with one of them replaced."""
    names = REGISTRY[op].parameters

    def reject(
        name: str,
        argument: str,
        value: Any,
        error: type[Exception],
        expected: str,
        got: str,
        at: str | None = None,  # the place in a list that the message names
    ) -> Reject:
        bad = changed(args, names.index(argument), value)
        return Reject(op, name, bad, error, at or argument, expected, got)

    return reject
