"""``pyfastft demo``: fine-tune a pretrained model with every method, and compare.

By default a small vision transformer, pretrained here on scikit-learn's handwritten digits, moves
to inverted and rotated digits from a few examples per class. ``--model`` and ``--data`` take a
transformers model folder and the user's own labelled text instead. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from pyfastft._cli import UsageError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pyfastft demo``."""
    parser.add_argument("--model", metavar="DIR", type=Path, help="a transformers model folder")
    parser.add_argument("--data", metavar="FILE", type=Path, help="labelled text, with --model")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("pyfastft-demo"),
        help="where table, figures and plot go; replaces an older demo's (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    parser.add_argument("--quick", action="store_true", help="fewer steps, one run a method")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        0. Whether a method is better than another is a result, not a failure.

    Raises:
        UsageError: the model, the data, the output folder or an installed package is not right.
    """
    from pyfastft.demo import output

    started = time.perf_counter()
    output.expect_writable(args.output)
    _expect_installed("matplotlib")
    task = _task(args)
    from pyfastft.demo.training import compare

    results = compare(task, runs=1 if args.quick else task.runs)
    document: dict[str, Any] = output.document(
        task, results, seed=args.seed, quick=args.quick, seconds=time.perf_counter() - started
    )
    output.write(args.output, document, task)
    print(json.dumps(document, indent=2) if args.json else output.table(document))
    print(f"written to {args.output}", file=sys.stderr)
    return 0


def _task(args: argparse.Namespace) -> Any:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device")
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted if args.device == "auto" else args.device)
    if (args.model is None) != (args.data is None):
        raise UsageError("--model and --data go together: a model folder and a file of its text")
    if args.model is None:
        _expect_installed("sklearn")
        from pyfastft.demo.digits import Digits

        return Digits(seed=args.seed, quick=args.quick, device=device)
    from pyfastft.demo.text import Text, read_examples

    examples = read_examples(args.data)
    _expect_installed("transformers")
    return Text(args.model, examples, seed=args.seed, quick=args.quick, device=device)


_EXTRAS = {"sklearn": "demo", "matplotlib": "demo", "transformers": "hf"}


def _expect_installed(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        extra = _EXTRAS[package]
        raise UsageError(
            f"the demo needs {package}, which is not installed: pip install 'pyfastft[{extra}]'"
        )
