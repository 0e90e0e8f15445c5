"""``pyfastft doctor``: what runs on this machine, what does not and why, and whether it is right.

The self-test runs the samples of :mod:`pyfastft.testing.samples` through every op on every backend
that can run here, and holds each output to the policy of :mod:`pyfastft.testing.tolerance`.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import textwrap
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

import pyfastft
from pyfastft import _native, backend
from pyfastft._cli import UsageError, columns
from pyfastft._env import VARIABLES
from pyfastft._op import BACKENDS, ORDER, REGISTRY, Op
from pyfastft.testing.samples import (
    FLOAT32,
    FLOAT64,
    PRECISIONS,
    Precision,
    Sample,
    flat,
    outputs_of,
    samples,
    upcast,
)
from pyfastft.testing.tolerance import accuracy_bound, assert_accurate, assert_exact, error

_REPETITIONS = 5


@dataclass(frozen=True)
class Cell:
    """One op on one backend: per precision None where it runs, else the reason."""

    op: str
    backend: str
    device: str
    reasons: dict[str, str | None]

    @property
    def runs(self) -> bool:
        return self.reasons[str(FLOAT32)] is None

    def __str__(self) -> str:
        able = [name for name, why in self.reasons.items() if why is None]
        if not able:
            return "no"
        common = [str(precision) for precision in PRECISIONS]
        return "yes" if set(common) <= set(able) else " ".join(able)


@dataclass(frozen=True)
class SelfTest:
    """An op's samples on one backend against the float64 reference."""

    op: str
    backend: str
    device: str
    samples: int
    max_error: float
    of_bound: float  # the worst error as a share of what the tolerance policy allows
    milliseconds: float  # one call on the largest sample, median
    failure: str | None


def diagnose(*, selftest: bool = True) -> dict[str, Any]:
    """Everything that ``pyfastft doctor`` tells, as JSON types.

    Raises:
        UsageError: an environment variable has a value that it cannot have.
    """
    try:
        _native.why_no_cpu()
    except ValueError as error:
        raise UsageError(str(error)) from None
    cells = [cell(op, name) for op in REGISTRY.values() for name in BACKENDS]
    tests = [self_test(c) for c in cells if c.runs] if selftest else []
    return {
        "pyfastft": pyfastft.__version__,
        "versions": _versions(),
        "machine": _machine(),
        "extensions": _extensions(),
        "environment": [asdict(v) | {"effective": v.effective} for v in VARIABLES],
        "matrix": [asdict(c) | {"runs": c.runs} for c in cells],
        "selftest": [asdict(t) for t in tests],
        "ok": all(t.failure is None for t in tests),
    }


def cell(op: Op, name: str) -> Cell:
    """Whether a backend takes an op's first sample, in every precision."""
    device = _device_of(name)
    sample = next(samples(op.name))
    return Cell(
        op=op.name,
        backend=name,
        device=device.type,
        reasons={str(p): _why_not(op, name, sample, p) for p in (*PRECISIONS, FLOAT64)},
    )


def self_test(tested: Cell) -> SelfTest:
    """Run every sample in every precision that the backend takes."""
    op = REGISTRY[tested.op]
    interpreted = tested.backend == "triton" and tested.device == "cpu"
    chosen = [s for s in samples(op.name) if not (s.large and interpreted)]
    able = [p for p in PRECISIONS if tested.reasons[str(p)] is None]
    worst, share, count, failure = 0.0, 0.0, 0, None
    for sample in chosen:
        for precision in able:
            if _why_not(op, tested.backend, sample, precision) is not None:
                continue
            count += 1
            try:
                found, of_bound = _check(op, tested.backend, sample, precision)
            except Exception as raised:
                failure = failure or f"{sample.name}, {precision}: {_first_line(raised)}"
                continue
            worst = max(worst, found) if precision == FLOAT32 else worst
            share = max(share, of_bound)
    return SelfTest(
        op=tested.op,
        backend=tested.backend,
        device=tested.device,
        samples=count,
        max_error=worst,
        of_bound=share,
        milliseconds=0.0 if failure else _time(op, tested.backend, chosen),
        failure=failure,
    )


def _device_of(name: str) -> torch.device:
    gpu = torch.cuda.is_available() and name in ORDER["cuda"] and name != "reference"
    return torch.device("cuda", 0) if gpu else torch.device("cpu")


def _why_not(op: Op, name: str, sample: Sample, precision: Precision) -> str | None:
    if name == "cuda" and (why := _native.why_no_cuda()):
        return why
    impl = op.impl(name)
    if isinstance(impl, str):
        return impl
    return impl.unsupported(*sample.build(precision, _device_of(name)))


def _outputs(op: Op, name: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    with backend(name):
        return outputs_of(op, args)


def _check(op: Op, name: str, sample: Sample, precision: Precision) -> tuple[float, float]:
    """The largest error of a sample's outputs, absolute and as a share of the bound."""
    args = sample.build(precision, _device_of(name))
    truth = _outputs(op, "reference", upcast(args))
    naive = _outputs(op, "reference", args)
    gradient = op.name.endswith("_backward")
    worst, share = 0.0, 0.0
    for i, (a, t, n) in enumerate(zip(_outputs(op, name, args), truth, naive, strict=True)):
        if not t.is_floating_point():
            assert_exact(a, t, f"output {i}")
            continue
        assert_accurate(a, t, n, gradient=gradient, what=f"output {i}")
        if a.numel():
            found, bound = error(a, t), accuracy_bound(t, n, gradient=gradient)
            worst, share = max(worst, found), max(share, found / bound if bound else 0.0)
    return worst, share


def _time(op: Op, name: str, chosen: list[Sample]) -> float:
    """Milliseconds of one call on the sample with the most elements, median of a few."""
    device = _device_of(name)
    built = [sample.build(FLOAT32, device) for sample in chosen]
    args = max(built, key=_elements)
    times = []
    for _ in range(1 + _REPETITIONS):
        start = time.perf_counter()
        _outputs(op, name, args)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def _elements(args: tuple[Any, ...]) -> int:
    return sum(arg.numel() for arg in flat(args) if isinstance(arg, torch.Tensor))


def _first_line(raised: Exception) -> str:
    return f"{type(raised).__name__}: {str(raised).strip().splitlines()[0] if str(raised) else ''}"


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda,
        "triton": version("triton"),
        "numpy": version("numpy"),
        "safetensors": version("safetensors"),
        "transformers": version("transformers"),
        "peft": version("peft"),
        "nvcc": _native.build_info().get("cuda", {}).get("nvcc"),
    }


def _machine() -> dict[str, Any]:
    isa = None
    if _native.why_no_cpu() is None:
        detected, active = _native.cpu().isa()
        levels = _native.ISA_LEVELS
        isa = {"detected": levels[detected], "active": levels[active]}
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "capability": f"sm_{properties.major}{properties.minor}",
                    "memory": properties.total_memory,
                }
            )
    return {
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "gpus": gpus,
    }


def _extensions() -> dict[str, str | None]:
    return {"cpu": _native.why_no_cpu(), "cuda": _native.why_no_cuda()}


# -- as text ---------------------------------------------------------------------------------------


def render(found: dict[str, Any]) -> str:
    """What :func:`diagnose` found, for people."""
    sections = [
        _render_machine(found),
        _render_matrix(found["matrix"]),
        *([_render_selftest(found["selftest"])] if found["selftest"] else []),
        _render_environment(found["environment"]),
    ]
    if not found["ok"]:
        sections.append("The self-test FAILED: results on this machine cannot be trusted.")
    return "\n\n".join(sections)


def _render_machine(found: dict[str, Any]) -> str:
    machine = found["machine"]
    isa, gpus = machine["isa"], machine["gpus"]
    lines = [f"pyfastft {found['pyfastft']} on {machine['platform']}", ""]
    rows = [[name, version or "-"] for name, version in found["versions"].items()]
    level = f"{isa['active']} (detected: {isa['detected']})" if isa else "-"
    rows.append(["CPU kernels", found["extensions"]["cpu"] or level])
    rows.append(["threads", str(machine["threads"])])
    rows += [
        ["GPU", f"{g['name']}, {g['capability']}, {g['memory'] / 2**30:.0f} GiB"] for g in gpus
    ] or [["GPU", "none that torch can use"]]
    rows.append(["CUDA kernels", found["extensions"]["cuda"] or "loaded"])
    return "\n".join([*lines, columns(rows)])


def _render_matrix(cells: list[dict[str, Any]]) -> str:
    made = [Cell(c["op"], c["backend"], c["device"], c["reasons"]) for c in cells]
    by_op: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    for c in made:
        refused: dict[str, list[str]] = {}
        for precision, why in c.reasons.items():
            if why is not None:
                refused.setdefault(why, []).append(precision)
        marks = []
        for why, precisions in refused.items():
            everywhere = len(precisions) == len(c.reasons)
            note = f"{c.backend}{'' if everywhere else ', ' + ' '.join(precisions)}: {why}"
            notes.setdefault(note, []).append(c.op)
            marks.append(f"[{list(notes).index(note) + 1}]")
        by_op.setdefault(c.op, []).append(" ".join([str(c), *marks]))
    rows = [["op", *BACKENDS], *([op, *texts] for op, texts in by_op.items())]
    lines = ["What runs here", "", columns(rows)]
    for number, note in enumerate(notes, 1):
        lines += textwrap.wrap(
            f"[{number}] {note}", 98, initial_indent="  ", subsequent_indent=6 * " "
        )
    return "\n".join(lines)


def _render_selftest(tests: list[dict[str, Any]]) -> str:
    rows = [["op", "backend", "device", "samples", "max error", "of bound", "ms", ""]]
    for t in tests:
        rows.append(
            [
                t["op"],
                t["backend"],
                t["device"],
                str(t["samples"]),
                f"{t['max_error']:.1e}",
                f"{t['of_bound']:.0%}",
                f"{t['milliseconds']:.3f}",
                f"FAILED: {t['failure']}" if t["failure"] else "ok",
            ]
        )
    head = "Self-test against the float64 reference (max error in fp32; one call on the largest)"
    return "\n".join([head, "", columns(rows, right=(3, 4, 5, 6))])


def _render_environment(variables: list[dict[str, str]]) -> str:
    rows = [["variable", "read", "in effect", "meaning"]]
    rows += [[v["name"], v["read"], v["effective"], v["meaning"]] for v in variables]
    return "\n".join(["Environment", "", columns(rows)])
