"""Figures -> tables, plot, README.

    python -m pyfastft.benchmarks.report --readme README.md [--check]

fills the text between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` from the committed
results: NAME is a family, ``bars`` or ``headline``. With ``--check`` nothing is written, and the
exit status is 1 where the text is not what the results say.

The results are ``results/<machine>/<family>.json``: machine, provenance and one row per case, as
:class:`pyfastft.benchmarks.measure.Row` has it; beside it a plot. ``results/<machine>/bars.json``
holds the figures of ``bars.toml``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyfastft.benchmarks import bars
from pyfastft.benchmarks.machine import CHECKOUT
from pyfastft.benchmarks.measure import FAMILIES, OURS, PEERS, Row, family

RESULTS = Path(__file__).resolve().parent / "results"
_BLOCK = re.compile(r"(<!-- begin: (?P<name>[\w-]+) -->\n).*?(<!-- end: (?P=name) -->)", re.DOTALL)
_COLOURS = {OURS: "#1b6ca8", "torch.compile": "#b4b9c0", "peft": "#e0a458"}
_BEGIN = re.compile(r"<!-- begin: ([\w-]+) -->")


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    # Lists of numbers on one line each: the file is read by people too.
    text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), json.dumps(record, indent=1))
    unfinished.write_text(text + "\n")
    os.replace(unfinished, path)


def speed_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table of a family's rows: its head, then one line per case."""
    peers = [peer for peer in PEERS if any(peer in row.median_ms for row in rows)]
    head = ["M, K, N", "R", "p", "dtype", "backend", "match", "ms", "GFLOP/s", "of roofline"]
    lines = [head + [f"over {peer}" for peer in peers]]
    for row in rows:
        case = row.case
        start = [", ".join(map(str, case.shape)), str(case.rank), f"{case.p:g}", case.dtype]
        if not row.match:
            lines.append([*start, row.backend, "NO", *["not recorded"] * (3 + len(peers))])
            continue
        figures = [
            f"{row.median_ms[OURS]:.4g} ± {row.iqr_ms[OURS] / 2:.2g}",
            f"{row.gflops[OURS]:.0f}",
            f"{row.roofline['percent'][OURS]:.0f} %",
        ]
        ratios = [_ratio(row.speedup[peer]) if peer in row.speedup else "-" for peer in peers]
        lines.append([*start, row.backend, "yes", *figures, *ratios])
    return lines


def _ratio(ratio: Sequence[float]) -> str:
    value, low, high = ratio
    return f"{value:.2f}x [{low:.2f}, {high:.2f}]"


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns, for a terminal."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width for width in widths]
    shown = [lines[0], rule, *lines[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in shown
    )


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def source(record: Mapping[str, Any]) -> str:
    """Where a result comes from, in one line."""
    machine, provenance = record["machine"], record["provenance"]
    hardware = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    if not machine.get("gpu") and machine["isa"]:
        hardware += f", {machine['isa']}"
    versions = provenance["versions"]
    software = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "peft") if name in versions
    )
    revision = provenance["git_sha"] or "no revision"
    if provenance["dirty"]:
        revision += " with changes"
    busy = "; measured on a busy machine" if record["busy_at_start"] else ""
    return f"{hardware}; {software}; {revision}, {provenance['date']}{busy}"


def left_out(rows: Sequence[Row]) -> list[str]:
    """The peers that could not take part, with the reason, once each."""
    return sorted({f"{peer}: {why}" for row in rows for peer, why in row.absent.items()})


def plot(record: Mapping[str, Any], path: Path) -> bool:
    """Draw speeds against PyTorch's; False where nothing can be drawn, or matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in map(Row.from_dict, record["rows"]) if "pytorch" in row.speedup]
    if not rows:
        return False
    providers = [name for name in _COLOURS if any(name in row.median_ms for row in rows)]
    height = 0.8 / len(providers)
    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.55 * len(rows)), layout="constrained")
    for place, provider in enumerate(providers):
        drawn = [(at, row) for at, row in enumerate(rows) if provider in row.median_ms]
        speeds = [row.median_ms["pytorch"] / row.median_ms[provider] for _, row in drawn]
        middles = [at + (place - (len(providers) - 1) / 2) * height for at, _ in drawn]
        axes.barh(middles, speeds, height, label=provider, color=_COLOURS[provider])
        if provider == OURS:
            ratios = [row.speedup["pytorch"] for _, row in drawn]
            margins = [
                [value - low for value, low, _ in ratios],
                [high - value for value, _, high in ratios],
            ]
            axes.errorbar(speeds, middles, xerr=margins, fmt="none", ecolor="black", capsize=2)
            for middle, (value, _, _) in zip(middles, ratios, strict=True):
                axes.text(
                    0.03, middle, f"{value:.2f}", color="white", fontsize=8, va="center_baseline"
                )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("speed, PyTorch eager = 1; medians of one interleaved run, ours with its 95 %")
    title = [f"{rows[0].op}, forward + backward", *source(record).split("; ")]
    axes.set_title("\n".join(title), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the software's own version in it, the same figures give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return True


def _label(row: Row) -> str:
    case = row.case
    return f"({', '.join(map(str, case.shape))})\nR={case.rank} p={case.p:g} {case.dtype}"


def blocks(results: Path) -> dict[str, str]:
    """The generated texts of the README by their names."""
    texts = {}
    for name in FAMILIES:
        parts = []
        for path in sorted(results.glob(f"*/{name}.json")):
            record = json.loads(path.read_text())
            rows = [Row.from_dict(row) for row in record["rows"]]
            parts.append(f"{source(record)}\n\n{markdown_table(speed_cells(rows))}")
            picture = path.with_suffix(".png")
            if picture.is_file():
                where = f"benchmarks/results/{path.parent.name}/{picture.name}"
                parts.append(f"![{name}, speed beside its peers]({where})")
        texts[name] = "\n\n".join(parts) or "not measured"
    parts = []
    for path in sorted(results.glob("*/bars.json")):
        figures = json.loads(path.read_text())["figures"]
        findings = [bars.judge_recorded(bar, figures.get(bar.id)) for bar in bars.load()]
        measured = [finding for finding in findings if finding.record]
        table = markdown_table(bars.cells(measured))
        parts.append(f"On `{path.parent.name}`:\n\n{table}")
    texts["bars"] = "\n\n".join(parts) or "not measured"
    texts["headline"] = _headline(results)
    path = results / "methods.json"
    rows_of = json.loads(path.read_text())["rows"] if path.is_file() else []
    texts["methods"] = markdown_table(method_cells(rows_of)) if rows_of else "not measured"
    return texts


def method_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Methods of fine-tuning beside each other, as :mod:`pyfastft.benchmarks.methods` has them."""
    cells = [
        [
            *("method", "task", "trained", "accuracy, %", "over full, points", "ms/step"),
            *("state, MB", "file, MB", "runs x steps", "machine", "revision"),
        ]
    ]
    for row in rows:
        machine, provenance = row["machine"], row["provenance"]
        cells.append(
            [
                row["method"],
                row["task"],
                f"{row['trained']:,}",
                f"{row['accuracy_mean']:.1f} ± {row['accuracy_standard_error']:.1f}",
                f"{row['over_full_mean']:+.1f} ± {row['over_full_standard_error']:.1f}",
                f"{row['ms_per_step']:.0f}",
                f"{row['state_bytes'] / 1e6:.2f}",
                f"{row['file_bytes'] / 1e6:.2f}",
                f"{len(row['accuracy'])} x {row['steps']}",
                f"{machine['name']}, {machine['threads']} threads",
                f"{provenance['git_sha']}{' and changes' if provenance['dirty'] else ''}",
            ]
        )
    return cells


def _headline(results: Path) -> str:
    """What the project does for a LoRA layer, one sentence per machine."""
    sentences = []
    for path in sorted(results.glob("*/lora.json")):
        record = json.loads(path.read_text())
        for row in map(Row.from_dict, record["rows"]):
            if row.case != family("lora").QUICK or not row.speedup:
                continue
            over = " and ".join(
                f"{row.speedup[peer][0]:.2f} times as fast as {title}"
                for peer, title in (("peft", "PEFT's layer"), ("pytorch", "PyTorch's expression"))
                if peer in row.speedup
            )
            sentences.append(
                f"A LoRA layer's forward and backward at ({row.case}) takes "
                f"{row.median_ms[OURS]:.3g} ms on `{path.parent.name}`: {over}."
            )
    return "\n".join(sentences) or "not measured"


def fill(text: str, texts: Mapping[str, str]) -> str:
    """A README with every marked block replaced.

    Raises:
        ValueError: a marker has no end, or names no generated text.
    """
    found = {match["name"] for match in _BLOCK.finditer(text)}
    for name in _BEGIN.findall(text):
        if name not in found:
            raise ValueError(f"README: <!-- begin: {name} --> has no <!-- end: {name} -->")
        if name not in texts:
            known = ", ".join(sorted(texts))
            raise ValueError(f"README: expected a block of {known}, got {name}")
    return _BLOCK.sub(lambda match: f"{match[1]}{texts[match['name']]}\n{match[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pyfastft.benchmarks.report",
        description="Fill the README's figures from the committed results.",
    )
    parser.add_argument("--readme", type=Path, default=CHECKOUT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    args = parser.parse_args(arguments)
    try:
        before = args.readme.read_text()
        after = fill(before, blocks(RESULTS))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if before == after:
        return 0
    if args.check:
        print(f"{args.readme}: its figures are not those of {RESULTS}", file=sys.stderr)
        return 1
    args.readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
