"""The demo's results: the document, the table, the plot, and the folder that holds them."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import pyfastft as ft
from pyfastft._cli import UsageError, columns
from pyfastft.demo.methods import ALPHA, DROPOUT, RANK
from pyfastft.demo.training import Result, Task

RESULTS = "results.json"
_COLUMNS = (
    "method",
    "before",
    "after",
    "trained parameters",
    "optimizer state",
    "peak memory",
    "ms a step",
)
# Colour-blind safe; what pyfastft computes stands out.
_COLOURS = ("#8c8c8c", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")


def expect_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made, or that holds what is not a demo's.

    Raises:
        UsageError: says which.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder}: a file of that name is in the way")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RESULTS).is_file():
        raise UsageError(f"--output {folder}: the folder holds other files; name another one")
    parent = folder.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--output {folder}: cannot write in {parent}")


def document(
    task: Task, results: list[Result], *, seed: int, quick: bool, seconds: float
) -> dict[str, Any]:
    """All that was measured, as JSON types."""
    by_name = {result.method.name: result for result in results}
    ours, plain, full = (by_name[name] for name in ("lora", "plain-lora", "full"))
    return {
        "task": task.name,
        "title": task.title,
        "facts": task.facts,
        "lora": {"rank": RANK, "alpha": ALPHA, "dropout": DROPOUT},
        "seed": seed,
        "quick": quick,
        "runs": len(ours.accuracy_after),
        "seconds": round(seconds, 1),
        "pyfastft": ft.__version__,
        "torch": torch.__version__,
        "device": task.device.type,
        "threads": torch.get_num_threads(),
        "backend": _backend(task.device),
        "methods": [_row(result) for result in results],
        "lora against full fine-tuning, points": 100
        * (statistics.mean(ours.accuracy_after) - statistics.mean(full.accuracy_after)),
        "plain PyTorch's step over pyfastft's": plain.milliseconds / ours.milliseconds,
    }


def _row(result: Result) -> dict[str, Any]:
    quartiles = statistics.quantiles(result.seconds, n=4)
    return {
        "name": result.method.name,
        "label": result.method.label,
        "engine": result.method.engine,
        "accuracy before": result.accuracy_before,
        "accuracy after": result.accuracy_after,
        "parameters": result.parameters,
        "trained parameters": result.trainable,
        "optimizer bytes": result.optimizer_bytes,
        "peak bytes": result.peak_bytes,
        "ms per step": result.milliseconds,
        "ms per step, quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
        "losses": result.losses,
    }


def _backend(device: torch.device) -> str | None:
    """The backend that a float32 LoRA layer runs on there."""
    a = torch.zeros(RANK, 64, device=device)
    w, x = torch.zeros(64, 64, device=device), torch.zeros(16, 64, device=device)
    scaling = torch.ones((), device=device)
    return ft.explain("lora_linear", x, w, a, a.T.contiguous(), None, scaling).chosen


def table(document: dict[str, Any]) -> str:
    """The results for a terminal."""
    rows = [_COLUMNS, *(_texts(row) for row in document["methods"])]
    return "\n".join(
        ["", document["title"], "", columns(rows, right=range(1, 7)), "", *_sentences(document)]
    )


def markdown(document: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    rows = [_COLUMNS, ("---", *["---:"] * 6), *(_texts(row) for row in document["methods"])]
    lines = [f"# {document['title'][0].upper()}{document['title'][1:]}", ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"{line}  " for line in _sentences(document)), "", "![plot](plot.png)", ""]
    lines += [f"- {name}: {_fact(value)}" for name, value in document["facts"].items()]
    lora = document["lora"]
    lines += [
        f"- LoRA: rank {lora['rank']}, alpha {lora['alpha']}, dropout {lora['dropout']}",
        f"- seed {document['seed']}, {document['runs']} runs a method",
        f"- pyfastft {document['pyfastft']} ({document['backend']} backend), "
        f"torch {document['torch']}, {document['device']}, {document['threads']} threads",
    ]
    return "\n".join(lines) + "\n"


def _fact(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    after = row["accuracy after"]
    spread = f" ± {100 * statistics.stdev(after):.1f}" if len(after) > 1 else ""
    share = row["trained parameters"] / row["parameters"]
    return (
        row["label"],
        f"{100 * statistics.mean(row['accuracy before']):.1f} %",
        f"{100 * statistics.mean(after):.1f}{spread} %",
        f"{row['trained parameters']:,} ({share:.1%})",
        _bytes(row["optimizer bytes"]),
        _bytes(row["peak bytes"]),
        f"{row['ms per step']:.1f}",
    )


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _sentences(document: dict[str, Any]) -> list[str]:
    points = document["lora against full fine-tuning, points"]
    ratio = document["plain PyTorch's step over pyfastft's"]
    runs = document["runs"]
    return [
        f"Accuracy is on held-out data, the mean of {runs} run{'s' if runs > 1 else ''}.",
        f"LoRA through pyfastft is {abs(points):.1f} points "
        f"{'above' if points >= 0 else 'below'} full fine-tuning.",
        f"Its step takes {1 / ratio:.2f} of the time of plain PyTorch's, measured in turn with it.",
        f"The whole took {document['seconds']:.0f} s.",
    ]


def write(folder: Path, document: dict[str, Any], task: Task) -> None:
    """Write results, page and plot, all or nothing; an older demo's folder is replaced."""
    folder = folder.resolve()
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fresh.chmod(0o755)
        (fresh / RESULTS).write_text(json.dumps(document, indent=2) + "\n")
        (fresh / "results.md").write_text(markdown(document), encoding="utf-8")
        plot(fresh / "plot.png", document, task)
        if folder.exists():
            aside = fresh.with_name(f"{fresh.name}-old")
            folder.rename(aside)
            fresh.rename(folder)
            shutil.rmtree(aside)
        else:
            fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def plot(path: Path, document: dict[str, Any], task: Task) -> None:
    """Draw accuracy, loss, step time and memory of every method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = document["methods"]
    labels = [row["label"].replace(", ", ",\n").replace("full ", "full\n") for row in rows]
    pictures = getattr(task, "pictures", None)
    heights = [0.6, 3, 3] if pictures else [3, 3]
    figure = Figure(figsize=(10, 7.4 if pictures else 6.6), layout="constrained")
    figure.suptitle(document["title"][0].upper() + document["title"][1:], fontweight="bold")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    if pictures:
        for column, (title, images) in enumerate(
            zip(("pretrained on", "fine-tuned to"), pictures(), strict=True)
        ):
            strip = figure.add_subplot(grid[0, column])
            # A column of nothing between two images: matplotlib leaves NaN blank.
            apart = torch.nn.functional.pad(images, (0, 2), value=float("nan"))
            strip.imshow(torch.cat(list(apart), dim=1).numpy(), cmap="gray", vmin=0, vmax=1)
            strip.set_title(title, fontsize=10)
            strip.axis("off")
    accuracy = figure.add_subplot(grid[-2, 0])
    loss = figure.add_subplot(grid[-2, 1])
    speed = figure.add_subplot(grid[-1, 0])
    memory = figure.add_subplot(grid[-1, 1])

    for i, row in enumerate(rows):
        colour = _COLOURS[i % len(_COLOURS)]
        after = [100 * value for value in row["accuracy after"]]
        mean = statistics.mean(after)
        accuracy.bar(i, mean, color=colour, width=0.6)
        accuracy.plot([i] * len(after), after, "k_", markersize=14)
        accuracy.text(i, mean / 2, f"{mean:.1f} %", ha="center", color="white", weight="bold")
        curve = [statistics.mean(values) for values in zip(*row["losses"], strict=True)]
        loss.plot(range(1, len(curve) + 1), curve, color=colour, label=row["label"])
        low, high = row["ms per step, quartiles"]
        middle = row["ms per step"]
        speed.bar(i, middle, color=colour, width=0.6)
        speed.errorbar(i, middle, [[middle - low], [high - middle]], color="black", capsize=4)
        speed.text(i, middle / 2, f"{middle:.1f}", ha="center", color="white", weight="bold")
        state, peak = row["optimizer bytes"] / 2**20, row["peak bytes"] / 2**20
        memory.bar(i, peak, color=colour, width=0.6)
        memory.bar(i, state, color="none", edgecolor="black", hatch="///", width=0.6)
        memory.text(i, peak, f"{peak:.0f}", ha="center", va="bottom")
    before = 100 * statistics.mean(rows[0]["accuracy before"])
    accuracy.axhline(before, color="black", linestyle=":")
    accuracy.text(0.5, before + 1.5, f"before:\n{before:.1f} %", ha="center", fontsize=8)
    accuracy.set(title="Held-out accuracy after fine-tuning (%; a line per run)", ylim=(0, 100))
    loss.set(title="Training loss, mean over the runs", xlabel="step", yscale="log")
    loss.legend(fontsize=8)
    speed.set_title("Milliseconds a step (median and quartiles)")
    memory.set_title("Peak memory, MiB (hatched: optimizer state)")
    memory.margins(y=0.12)
    for axes in (accuracy, speed, memory):
        axes.set_xticks(range(len(rows)), labels, fontsize=9)
    for axes in (accuracy, loss, speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=120)
