"""Figures beside their targets: ``bars.toml`` read, measured, judged.

An entry of ``bars.toml`` is one figure of one bar:

    id          its name, under which results are recorded
    bar, target the bar's text, copied unchanged
    family      a family, or "house" for what belongs to none
    figure      what is measured: "speedup", or a name in a module's FIGURES
    key         which of the figure's numbers counts; the others are printed beside it
    value, direction, unit     the target for the machine; without them the figure is only reported
    shape, rank, p, dtype      the case, where the figure has one
    statistic   what the number is
    machine     "cpu" or "cuda" for any such machine, or one machine's name
    slow        minutes: read from the committed results unless asked for
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfastft.benchmarks import figures, machine
from pyfastft.benchmarks.measure import OURS, PEERS, Case, family, measure

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings it
    import tomli as tomllib  # type: ignore[no-redef]

DIRECTIONS = {"at least": lambda found, value: found >= value, "at most": lambda f, v: f <= v}
HOUSE = "house"
_BUDGET_S = 6.0  # per case: one peer takes part, not three


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One entry of ``bars.toml``; see the module."""

    id: str
    bar: str
    target: str
    family: str
    figure: str
    unit: str
    statistic: str
    key: str = OURS
    value: float | None = None
    direction: str | None = None
    shape: tuple[int, int, int] | None = None
    rank: int | None = None
    p: float | None = None
    dtype: str | None = None
    machine: str = "cpu"
    slow: bool = False

    def __post_init__(self) -> None:
        if (self.value is None) != (self.direction is None):
            raise ValueError(f"bars.toml: {self.id}: value and direction come together")
        if self.direction is not None and self.direction not in DIRECTIONS:
            expected = " or ".join(DIRECTIONS)
            raise ValueError(
                f"bars.toml: {self.id}: expected direction {expected}, got {self.direction!r}"
            )
        parts = (self.shape, self.rank, self.p, self.dtype)
        if None in parts and any(part is not None for part in parts):
            raise ValueError(f"bars.toml: {self.id}: shape, rank, p and dtype come together")

    @property
    def case(self) -> Case | None:
        if self.shape is None:
            return None
        assert self.rank is not None
        assert self.p is not None
        assert self.dtype is not None
        return Case(self.shape, self.rank, self.p, self.dtype)

    def belongs(self, device: torch.device) -> bool:
        """Whether the bar is about this machine."""
        return self.machine in (device.type, machine.slug(device))


@dataclass(frozen=True)
class Finding:
    """A bar with what was measured.

    Attributes:
        verdict: "met", "falls short", "reported" or "not measured".
        record: as in ``bars.json``: numbers by key, revision, date; None where not measured.
        why: why it was not measured, or what went wrong.
    """

    bar: Bar
    verdict: str
    record: Mapping[str, Any] | None = None
    why: str = ""


def load(text: str | None = None) -> list[Bar]:
    """The bars, in the file's order.

    Raises:
        ValueError: an entry lacks a field, has one too many, or repeats an id.
    """
    if text is None:
        text = importlib.resources.files(__package__).joinpath("bars.toml").read_text()
    bars: list[Bar] = []
    for entry in tomllib.loads(text)["bar"]:
        if "shape" in entry:
            entry["shape"] = tuple(entry["shape"])
        try:
            bars.append(Bar(**entry))
        except TypeError as error:
            raise ValueError(f"bars.toml: {entry.get('id', entry)}: {error}") from None
    ids = [bar.id for bar in bars]
    if repeated := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"bars.toml: repeated id {', '.join(repeated)}")
    return bars


def judge(bar: Bar, record: Mapping[str, Any]) -> Finding:
    """Hold recorded numbers to the target."""
    if record.get("error"):
        return Finding(bar, "falls short", record, record["error"])
    if bar.key not in record["numbers"]:
        why = record.get("absent", {}).get(bar.key, f"{bar.key} is not at hand")
        return Finding(bar, "not measured", None, why)
    if bar.value is None or bar.direction is None:
        return Finding(bar, "reported", record)
    met = DIRECTIONS[bar.direction](record["numbers"][bar.key], bar.value)
    return Finding(bar, "met" if met else "falls short", record)


def judge_recorded(bar: Bar, record: Mapping[str, Any] | None) -> Finding:
    """The same for what may not have been recorded."""
    if record is None:
        return Finding(bar, "not measured", None, "slow: --slow measures it" if bar.slow else "")
    return judge(bar, record)


class Session:
    """Measures figures, each once, and remembers them.

    Args:
        device: where.
        known: figures that a run has brought already, by (family, figure, case).
    """

    def __init__(
        self,
        device: torch.device,
        known: Mapping[tuple[str, str, Case | None], Mapping[str, float]] | None = None,
    ) -> None:
        self.device = device
        self._known: dict[tuple[str, str, Case | None], dict[str, Any]] = {
            key: {"numbers": dict(numbers)} for key, numbers in (known or {}).items()
        }

    def record(self, bar: Bar) -> dict[str, Any]:
        """What ``bars.json`` holds of a bar. A figure that cannot be taken has an error instead;
        what is absent, because a peer is not installed, is named with the reason."""
        key = (bar.family, bar.figure, bar.case)
        if key not in self._known:
            try:
                found = self._measure(bar)
                numbers = {name: one for name, one in found.items() if not isinstance(one, str)}
                self._known[key] = {"numbers": numbers}
                if absent := {name: why for name, why in found.items() if isinstance(why, str)}:
                    self._known[key]["absent"] = absent
            except Exception as error:
                self._known[key] = {"numbers": {}, "error": f"{type(error).__name__}: {error}"}
        stamp = machine.provenance()
        origin = {name: stamp[name] for name in ("git_sha", "dirty", "date")}
        return {**self._known[key], **origin}

    def _measure(self, bar: Bar) -> dict[str, float | str]:
        if bar.figure == "speedup":
            assert bar.case is not None
            peers = [bar.key] if bar.key in PEERS else PEERS
            row = measure(
                family(bar.family), bar.case, self.device, peers=peers, budget_s=_BUDGET_S
            )
            if not row.match:
                raise AssertionError(row.error)
            return {**row.absent, **speedups(row.speedup)}
        where = figures.FIGURES if bar.family == HOUSE else family(bar.family).FIGURES
        return where[bar.figure](bar.case, self.device)


def speedups(ratios: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The numbers of the figure "speedup": the ratio of medians over every peer."""
    return {peer: ratio[0] for peer, ratio in ratios.items()}


def evaluate(
    bars: Sequence[Bar], session: Session, results: Path, *, slow: bool = False
) -> list[Finding]:
    """Measure and judge; slow bars from the committed results, unless ``slow``."""
    findings = []
    for bar in bars:
        if not bar.belongs(session.device):
            findings.append(Finding(bar, "not measured", None, f"a bar of {bar.machine}"))
        elif bar.slow and not slow:
            findings.append(judge_recorded(bar, recorded(results, session.device).get(bar.id)))
        else:
            findings.append(judge(bar, session.record(bar)))
    return findings


def recorded(results: Path, device: torch.device) -> dict[str, dict[str, Any]]:
    """The committed figures by id: of this machine; of the others where it has none."""
    found: dict[str, dict[str, Any]] = {}
    own = results / machine.slug(device) / "bars.json"
    others = [path for path in sorted(results.glob("*/bars.json")) if path != own]
    for path in (*others, own):
        if path.is_file():
            for name, record in json.loads(path.read_text())["figures"].items():
                found[name] = {**record, "machine": path.parent.name}
    return found


def cells(findings: Sequence[Finding]) -> list[list[str]]:
    """The table: its head, then target beside measured, one line per bar."""
    lines = [["bar", "target", "measured", "statistic", "verdict", "revision"]]
    for finding in findings:
        bar, record = finding.bar, finding.record
        wanted = (
            f"{bar.direction} {_number(bar.value)} {bar.unit}" if bar.value is not None else "-"
        )
        name = bar.id if bar.case is None else f"{bar.id} ({bar.case})"
        verdict = f"{finding.verdict}: {finding.why}" if finding.why else finding.verdict
        lines.append(
            [name, wanted, _measured(bar, record), bar.statistic, verdict, _origin(record)]
        )
    return lines


# Numbers beside a bar's own in the table; ``bars.json`` has all.
_MOST_BESIDE = 4


def _measured(bar: Bar, record: Mapping[str, Any] | None) -> str:
    numbers = dict(record["numbers"]) if record else {}
    if bar.key not in numbers:
        return "-"
    shown = f"{_number(numbers.pop(bar.key))} {bar.unit}"
    beside = ", ".join(
        f"{name} {_number(number)}" for name, number in list(numbers.items())[:_MOST_BESIDE]
    )
    return f"{shown} ({beside})" if beside else shown


def _origin(record: Mapping[str, Any] | None) -> str:
    if not record:
        return "-"
    sha = record.get("git_sha") or "no revision"
    where = f" on {record['machine']}" if "machine" in record else ""
    return f"{sha}{' with changes' if record.get('dirty') else ''}{where}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
