"""Samples of select_topk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from pyfastft.ops.masked.select import PAIRED, SCORES
from pyfastft.testing.samples._base import FLOAT32, Drawer, Precision, Reject, Sample, rejecter

_SHAPES = ((5, 7), (13,), (2, 3, 4))
RNG = (0x0123456789ABCDEF, 0x7EDCBA9876543210)


def _arguments(
    name: str,
    score: str,
    k: int,
    largest: bool,
    shapes: tuple[tuple[int, ...], ...],
    exclude: bool,
    precision: Precision,
    device: torch.device,
) -> tuple[Any, ...]:
    draw = Drawer(name, precision, device)
    tensors = [draw.base(*shape) for shape in shapes]
    if "ties" in name:
        tensors = [tensor.round() for tensor in tensors]
    if "nan" in name:
        tensors[0].view(-1)[::3] = float("nan")
        tensors[0].view(-1)[1] = float("inf")
        tensors[0].view(-1)[2] = -float("inf")
    others = []
    if score in PAIRED:
        others = [draw.base(*shape) for shape in shapes]
    if score == "wanda":
        others = [draw.wide(t[0].numel() if t.dim() > 1 else t.numel()).abs() for t in tensors]
    left_out = []
    if exclude:
        left_out = [torch.arange(0, t.numel(), 3, device=device) for t in tensors]
        left_out[-1] = left_out[-1].int()
    rng = torch.tensor(RNG, device=device) if score == "random" else None
    return tensors, others, left_out, k, score, largest, rng


def _samples() -> Iterator[Sample]:
    op = "select_topk"

    def sample(
        name: str,
        score: str = "magnitude",
        k: int = 9,
        largest: bool = True,
        shapes: tuple[tuple[int, ...], ...] = _SHAPES,
        exclude: bool = False,
        large: bool = False,
    ) -> Sample:
        build = partial(_arguments, name, score, k, largest, shapes, exclude)
        return Sample(op, name, build, large)

    for score in SCORES:
        yield sample(score, score)
        yield sample(f"{score}-smallest", score, largest=False)
    yield sample("none", k=0)
    yield sample("all", k=72)
    yield sample("ties", k=30)
    yield sample("ties-smallest", k=30, largest=False)
    yield sample("nan", k=25)
    yield sample("nan-smallest", k=60, largest=False)
    yield sample("nan-value", "value", k=70)
    yield sample("exclude", k=20, exclude=True)
    yield sample("exclude-ties-all", k=47, exclude=True)
    yield sample("an-empty-tensor", k=2, shapes=((3, 2), (0, 4), (5,)))
    yield sample("large", k=4000, shapes=((300, 500), (70000,)), large=True)
    yield sample("large-ties", k=50000, shapes=((300, 500), (70000,)), exclude=True, large=True)


def _rejects() -> Iterator[Reject]:
    args = _arguments("product", "product", 9, True, _SHAPES, True, FLOAT32, torch.device("cpu"))
    reject = rejecter("select_topk", args)
    tensors, others, left_out = args[:3]
    integers = [tensors[0].int(), *tensors[1:]]
    short = [others[0][1:], *others[1:]]
    half = [others[0].half(), *others[1:]]
    yield reject("k-large", "k", 73, ValueError, "0 to 47", "73")
    yield reject("k-negative", "k", -1, ValueError, "0 to 47", "-1")
    yield reject("score", "score", "best", ValueError, "one of magnitude", "'best'")
    yield reject("rng", "score", "random", ValueError, "no tensors", "3", at="others")
    yield reject("others-missing", "others", [], ValueError, "3 tensors", "0")
    yield reject("others-shape", "others", short, ValueError, "(5, 7)", "(4, 7)", at="others[0]")
    yield reject("others-dtype", "others", half, TypeError, "float32", "float16", at="others[0]")
    yield reject("exclude-short", "exclude", left_out[:2], ValueError, "3 lists or none", "2")
    at = "tensors[0]"
    yield reject("tensors-integer", "tensors", integers, TypeError, "float32", "int32", at=at)


SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {"select_topk": _samples}
REJECTS: dict[str, Callable[[], Iterator[Reject]]] = {"select_topk": _rejects}
