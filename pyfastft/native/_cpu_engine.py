"""Which GEMM computes the base product of lora_linear on a CPU.

    core     the library's own, for every shape: bits don't depend on the number of threads
    gemm     torch's, to whose rounded result the library adds the low-rank term

The core always runs, unless ``PYFASTFT_DETERMINISTIC=0`` permits torch's GEMM where
``_cpu_engine.json`` holds a measurement, of this CPU and this number of threads, in which it was
the faster one. ``make cpu-tune`` writes that table.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfastft._check import name_of
from pyfastft.triton_kernels import _measured

ENGINES = ("core", "gemm")
TABLE = Path(__file__).with_name("_cpu_engine.json")


@dataclass(frozen=True)
class Problem:
    """One direction of lora_linear with a plain weight. Dtypes by their names."""

    direction: str  # "forward" or "backward"
    m: int
    n: int
    k: int
    dtype: str
    threads: int


@dataclass(frozen=True)
class Choice:
    """An engine, and the reason for it."""

    engine: str
    why: str
    tiles: None = None


def why_not(engine: str, problem: Problem) -> str | None:
    """Why an engine cannot compute a problem; both can compute all."""
    return None


def candidates(engine: str, problem: Problem) -> tuple[()]:
    """The tiles with which an engine may compute a problem: neither has any to choose."""
    return ()


def choose(
    direction: str,
    wide: torch.Tensor,
    weight: torch.Tensor | None,
    *packed: torch.Tensor | None,
) -> Choice:
    """The engine of one direction; ``wide`` is x in the forward, the gradient in the backward."""
    if _forced is None and not _permitted:
        return _DETERMINISTIC
    if weight is None or any(one is not None for one in packed):
        return _PACKED
    m, (n, k) = wide.shape[:-1].numel(), weight.shape
    problem = Problem(direction, m, n, k, name_of(wide.dtype), torch.get_num_threads())
    return plan(problem, cpu_name())


def plan(problem: Problem, device: str) -> Choice:
    """The engine for a problem on a CPU of that name: what is forced, or else the measurement
    nearest to the problem, or else the core."""
    return _forced or _measured_choice(problem, device)


@functools.lru_cache(maxsize=4096)
def _measured_choice(problem: Problem, device: str) -> Choice:
    rows = _measured.read(TABLE).get(device, {}).get("rows", ())
    found = _measured.nearest(rows, problem, SAME, NEAR) if min(_sizes(problem)) else None
    if found is None:
        return Choice("core", f"nothing near has been measured on {device}")
    return Choice(
        found["engine"], f"measured on {device} at M={found['m']} N={found['n']} K={found['k']}"
    )


def _sizes(problem: Problem) -> tuple[int, ...]:
    return tuple(getattr(problem, name) for name in NEAR)


def explain_forward(x: torch.Tensor, weight: torch.Tensor | None, *rest: Any) -> str:
    """Which engine lora_linear would run on, and why."""
    packed, packed_dx = rest[-2:]
    return _told(choose("forward", x, weight, packed, packed_dx))


def explain_backward(
    grad: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor | None, *rest: Any
) -> str:
    """Which engine lora_linear_backward would run on, and why."""
    packed, packed_dx = rest[-3:-1]
    return _told(choose("backward", grad, weight, packed, packed_dx))


def _told(choice: Choice) -> str:
    return f"{choice.engine}: {choice.why}"


@functools.cache
def cpu_name() -> str:
    """What the table of measurements calls this CPU."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM|r|tm)\)| CPU| Processor| with.*|@.*", "", name).strip()
    # A virtual machine may hide the model's name; family and model then tell machines apart.
    if re.search(r"\d", name):
        return name
    return f"{name} {fields.get('cpu family', '')}-{fields.get('model', '')}"


def forget() -> None:
    """Read the table anew at the next call."""
    _measured.read.cache_clear()
    _measured_choice.cache_clear()


@contextlib.contextmanager
def forced(engine: str, tiles: None = None) -> Iterator[None]:
    """Compute with one engine, in the whole process, while this is open; also where bits have to
    be deterministic."""
    global _forced
    before = _forced
    _forced = Choice(engine, f"{engine} is forced")
    try:
        yield
    finally:
        _forced = before


_DETERMINISTIC = Choice("core", "bits do not depend on the number of threads")
_PACKED = Choice("core", "no other reads a packed weight, or has none to read")
SAME = ("direction", "dtype", "threads")
NEAR = ("m", "n", "k")
_permitted = os.environ.get("PYFASTFT_DETERMINISTIC") == "0"
# Process-wide, as a forced backend is, and for its reason.
_forced: Choice | None = None
