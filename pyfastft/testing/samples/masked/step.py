"""Samples of masked_adamw_, masked_sgd_ and masked_lion_."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pyfastft.testing.samples._base import FLOAT32, Drawer, Precision, Reject, Sample, rejecter
from pyfastft.testing.samples.masked._rectangles import PARTS
from pyfastft.testing.samples.masked.select import RNG

# How many states an op has, and the last three of its hyperparameters for each case.
_STATES = {"masked_adamw_": 2, "masked_sgd_": 1, "masked_lion_": 1}
_LAST = {
    "masked_adamw_": (0.9, 0.99, 1e-6),
    "masked_sgd_": (0.9, 0.1, 0.0),
    "masked_lion_": (0.9, 0.99, 0.0),
}
_SMALL = ("elements", "rows", "columns", "blocks", "whole", "vector", "none")
_LARGE = ("few-of-many", "many-of-many", "wide-blocks")


def _arguments(op: str, name: str, precision: Precision, device: torch.device) -> tuple[Any, ...]:
    """Values that the weights hold, gradients and state of the size of real ones."""
    parts = _LARGE if "large" in name else _SMALL
    draw = Drawer(name, precision, device)
    weights, values, grads, index, rows, columns = [], [], [], [], [], []
    states: list[list[torch.Tensor]] = [[] for _ in range(_STATES[op])]
    for part_name in parts:
        part = PARTS[part_name]
        count = part.count * part.rows * part.columns
        weights.append(draw.base(*part.shape))
        values.append(draw.wide(0 if "in-place" in name else count))
        grads.append(draw.wide(count, scale=0.1))
        first = draw.wide(count, scale=0.1)
        second = draw.wide(count, scale=0.1).square() + 1e-4
        for own, state in zip(states, (first, second), strict=False):
            own.append(state[:0] if "no-momentum" in name else state)
        index.append(part.index(part_name, device))
        rows.append(part.rows)
        columns.append(part.columns)
    last = _LAST[op]
    if "nesterov" in name:
        last = (0.9, 0.0, 1.0)
    step = 1.0 if "first" in name else 3.0
    sign = -1.0 if "maximize" in name else 1.0
    numbers = [(0.01 + 0.001 * i, 0.1, step, sign, *last) for i in range(len(parts))]
    hypers = torch.tensor(numbers, dtype=torch.float64)
    rng = torch.tensor(RNG) if "stochastic" in name else None
    return weights, values, *states, grads, index, rows, columns, hypers, rng


def _samples(op: str) -> Iterator[Sample]:
    names = ["masters", "in-place", "first", "maximize", "stochastic", "stochastic-in-place"]
    if op == "masked_sgd_":
        names += ["no-momentum", "nesterov", "nesterov-first"]
    for name in (*names, "large"):
        yield Sample(op, name, partial(_arguments, op, name), name == "large")


def _rejects(op: str) -> Iterator[Reject]:
    args = _arguments(op, "masters", FLOAT32, torch.device("cpu"))
    reject = rejecter(op, args)
    weights, values = args[:2]
    grads, index, rows, columns, hypers, _ = args[-6:]

    def at_first(several: list[Any], value: Any) -> list[Any]:
        return [value, *several[1:]]

    turned = at_first(weights, weights[0].T)
    yield reject("none", "weights", [], ValueError, "at least one", "none")
    yield reject(
        "weights-strides", "weights", turned, ValueError, "C-contiguous", "(1, 13)", at="weights[0]"
    )
    short, half = at_first(grads, grads[0][1:]), at_first(grads, grads[0].half())
    yield reject("grads-short", "grads", short, ValueError, "shape (11,)", "(10,)", at="grads[0]")
    yield reject("grads-half", "grads", half, TypeError, "float32", "float16", at="grads[0]")
    yield reject("grads-missing", "grads", grads[1:], ValueError, "7 of them", "6")
    spread = at_first(values, values[0].repeat(2)[::2])
    yield reject(
        "values-strides", "values", spread, ValueError, "contiguous", "(2,)", at="values[0]"
    )
    floats = at_first(index, index[0].float())
    yield reject("index-float", "index", floats, TypeError, "int32", "float32", at="index[0]")
    yield reject("rows", "rows", at_first(rows, 2), ValueError, "a divisor of 7", "2")
    yield reject("columns", "columns", at_first(columns, 0), ValueError, "at least 1", "0")
    yield reject("hypers", "hypers", hypers[:, 1:], ValueError, "shape (7, 7)", "(7, 6)")
    yield reject("hypers-float", "hypers", hypers.float(), TypeError, "float64", "float32")


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {op: partial(_samples, op) for op in _STATES}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {op: partial(_rejects, op) for op in _STATES}
