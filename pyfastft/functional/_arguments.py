"""What the functions fill in for their ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft._check import reject
from pyfastft._random import draw_rng, dropout_threshold


def as_scaling(scaling: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """s as the tensor that an op takes: float32, or float64 beside float64."""
    if isinstance(scaling, torch.Tensor):
        return scaling
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return torch.full((), scaling, dtype=dtype, device=like.device)


def rng_for(
    rng: torch.Tensor | None, p: float | Sequence[float], device: torch.device
) -> torch.Tensor | None:
    """The given rng, or one drawn where a probability drops anything."""
    if rng is None:
        for one in p if isinstance(p, Sequence) else (p,):
            if 0.0 < one <= 1.0 and dropout_threshold(one):
                return draw_rng(device)
    return rng


def for_each(op: str, name: str, value: Any, count: int) -> list[Any]:
    """One value for each of so many, whether one or all are given."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        reject(op, name, f"one value or {count}", len(value))
    return list(value)
