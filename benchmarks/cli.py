"""``pyfastft bench``: measure the kernels beside their peers.

Exit codes: 0; 1 where a kernel is not accurate or a bar falls short; 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from pyfastft._cli import UsageError
from pyfastft.benchmarks import bars, machine, report
from pyfastft.benchmarks.measure import (
    DTYPES,
    FAMILIES,
    FIGURES_ONLY,
    PEERS,
    Case,
    Row,
    family,
    measure,
)

_QUICK_BUDGET_S = 2.0
_BUDGET_S = 15.0
_DEFAULT_RANK, _DEFAULT_P = 16, 0.0
_Item = TypeVar("_Item")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pyfastft bench``."""
    every = (*FAMILIES, *FIGURES_ONLY, bars.HOUSE)
    parser.add_argument("--family", choices=every, help="only this family")
    parser.add_argument("--quick", action="store_true", help="one case, seconds, no torch.compile")
    parser.add_argument(
        "--shape", type=_shape, metavar="M,K,N", help="your own shape: tokens, in, out"
    )
    parser.add_argument("--rank", type=int, metavar="R", help=f"rank; with --shape {_DEFAULT_RANK}")
    parser.add_argument("--p", type=float, metavar="P", help="dropout; with --shape 0")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="only this dtype")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write JSON and plot there")
    parser.add_argument(
        "--update",
        action="store_true",
        help="measure everything, bars too; write results and README of the checkout",
    )
    parser.add_argument("--bars", action="store_true", help="targets beside what is measured")
    parser.add_argument(
        "--slow", action="store_true", help="measure the slow bars too: fresh clones, suites"
    )


def run(args: argparse.Namespace) -> int:
    """Run what :func:`add_arguments` parsed; the exit code.

    Raises:
        UsageError: options contradict each other, or there is no such device.
    """
    device = torch.device(args.device) if args.device else machine.default_device()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("bench: --device cuda: torch sees no CUDA device")
    if args.rank is not None and args.rank < 1:
        raise UsageError(f"bench: --rank: expected at least 1, got {args.rank}")
    if args.p is not None and not 0 <= args.p <= 1:
        raise UsageError(f"bench: --p: expected a probability, got {args.p}")
    if args.family in (*FIGURES_ONLY, bars.HOUSE) and not args.bars:
        raise UsageError(f"bench: --family {args.family}: has bars only, so with --bars")
    narrowed = [args.quick, args.shape, args.rank, args.p, args.dtype, args.family]
    if args.update and (any(option is not None and option is not False for option in narrowed)):
        raise UsageError("bench: --update measures everything; it takes no case and no family")
    if args.update and args.json:
        raise UsageError("bench: --update writes JSON files; it prints none")
    if args.update and not (machine.CHECKOUT / ".git").exists():
        raise UsageError("bench: --update writes into a git checkout, and this is none")
    load = machine.load_average()
    if machine.is_busy(load):
        print(f"bench: busy machine, load average {load}: figures will be off", file=sys.stderr)
    if args.bars and not args.update:
        return _bars(args, device)
    return _speed(args, device, load)


def _shape(text: str) -> tuple[int, int, int]:
    try:
        m, k, n = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected M,K,N, got {text!r}") from None
    if min(m, k, n) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes of at least 1, got {text!r}")
    return m, k, n


def cases(module: ModuleType, args: argparse.Namespace, device: torch.device) -> list[Case]:
    """The family's cases, or the user's own."""
    if args.shape:
        dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"]
        chosen = [Case(args.shape, _DEFAULT_RANK, _DEFAULT_P, dtype) for dtype in dtypes]
    elif args.quick:
        chosen = [dataclasses.replace(module.QUICK, dtype=args.dtype or module.QUICK.dtype)]
    else:
        chosen = [case for case in module.CASES[device.type] if args.dtype in (None, case.dtype)]
    changes: dict[str, Any] = {}
    if args.rank is not None:
        changes["rank"] = args.rank
    if args.p is not None:
        changes["p"] = args.p
    return [dataclasses.replace(case, **changes) for case in chosen]


def _speed(args: argparse.Namespace, device: torch.device, load: float | None) -> int:
    peers = tuple(peer for peer in PEERS if not (args.quick and peer == "torch.compile"))
    budget_s = _QUICK_BUDGET_S if args.quick else _BUDGET_S
    families = [name for name in FAMILIES if args.family in (None, name)]
    records, rows_of = {}, {}
    for name in families:
        module = family(name)
        chosen = cases(module, args, device)
        rows = [
            measure(module, case, device, peers=peers, budget_s=budget_s)
            for case in _progress(chosen, name)
        ]
        rows_of[name] = rows
        records[name] = _record(device, rows, load)
        folder = report.RESULTS if args.update else args.output
        if folder is not None:
            target = folder / machine.slug(device) / f"{name}.json"
            report.write_json(target, records[name])
            report.plot(records[name], target.with_suffix(".png"))
        if not args.json:
            _print_rows(records[name], rows)
    if args.json:
        print(json.dumps(records, indent=1))
    accurate = all(row.match for rows in rows_of.values() for row in rows)
    if args.update:
        met = _update_bars(args, device, rows_of)
        filled = report.main(["--readme", str(machine.CHECKOUT / "README.md")]) == 0
        return 0 if accurate and met and filled else 1
    return 0 if accurate else 1


def _record(device: torch.device, rows: Sequence[Row], load: float | None) -> dict[str, Any]:
    return {
        "machine": machine.describe(device),
        "provenance": machine.provenance(),
        "busy_at_start": machine.is_busy(load),
        "load_average_at_start": load,
        "rows": [row.to_dict() for row in rows],
    }


def _print_rows(record: dict[str, Any], rows: Sequence[Row]) -> None:
    print(report.source(record))
    print(report.text_table(report.speed_cells(rows)))
    for row in rows:
        if row.error:
            print(f"not accurate, nothing recorded: {row.case}: {row.error}")
    for line in report.left_out(rows):
        print(f"left out: {line}")


def _bars(args: argparse.Namespace, device: torch.device) -> int:
    chosen = [bar for bar in bars.load() if args.family in (None, bar.family)]
    session = bars.Session(device)
    findings = bars.evaluate(_progress(chosen, "bars"), session, report.RESULTS, slow=args.slow)
    return _tell(findings, as_json=args.json)


def _update_bars(
    args: argparse.Namespace, device: torch.device, rows_of: dict[str, list[Row]]
) -> bool:
    """Record every bar of this machine, the slow ones where asked for; whether all are met."""
    known = {
        (name, "speedup", row.case): bars.speedups(row.speedup)
        for name, rows in rows_of.items()
        for row in rows
        if row.match
    }
    session = bars.Session(device, known)
    findings = bars.evaluate(
        _progress(bars.load(), "bars"), session, report.RESULTS, slow=args.slow
    )
    own = report.RESULTS / machine.slug(device) / "bars.json"
    kept = json.loads(own.read_text())["figures"] if own.is_file() else {}
    fresh = {
        found.bar.id: dict(found.record)
        for found in findings
        if found.record and "machine" not in found.record
    }
    report.write_json(own, {"figures": {**kept, **fresh}})
    return _tell(findings, as_json=args.json) == 0


def _tell(findings: Sequence[bars.Finding], *, as_json: bool) -> int:
    short = [found for found in findings if found.verdict == "falls short"]
    if as_json:
        records = [
            {
                "id": found.bar.id,
                "target": found.bar.target,
                "verdict": found.verdict,
                "why": found.why,
                "record": found.record,
            }
            for found in findings
        ]
        print(json.dumps(records, indent=1))
    else:
        print(report.text_table(bars.cells(findings)))
        for found in short:
            print(f"falls short: {found.bar.id}: the bar is: {found.bar.target}")
    return 1 if short else 0


def _progress(items: Sequence[_Item], what: str) -> Iterable[_Item]:
    return tqdm(items, desc=what, disable=not sys.stderr.isatty(), leave=False)
