"""The command line: ``pyfastft``, and the same as ``python -m pyfastft``.

Exit codes: 0 done, 1 a check failed, 2 the call or its input was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import pyfastft
from pyfastft._cli import UsageError

_EXAMPLES = """\
examples:
  pyfastft                            what runs on this machine, and a self-test
  pyfastft doctor --json              the same, for a program
  pyfastft demo                       fine-tune a small vision transformer, compare methods
  pyfastft demo --model DIR --data F  the same with your own model and your own text
  pyfastft bench --help               measure the kernels on your own shapes
"""
_DEMO_EXAMPLES = """\
examples:
  pyfastft demo --quick
  pyfastft demo --output results --seed 1
  pyfastft demo --model ./MiniLM --data reviews.csv

DATA is a CSV or TSV file with the columns text and label, or a text file of lines
"label sentence". DIR is a folder that transformers' AutoModel loads; nothing is downloaded.
"""


def doctor(args: argparse.Namespace) -> int:
    """What runs here, why the rest does not, and whether it is right."""
    from pyfastft import _doctor

    found = _doctor.diagnose(selftest=not args.no_selftest)
    print(json.dumps(found, indent=2) if args.json else _doctor.render(found))
    return 0 if found["ok"] else 1


def demo(args: argparse.Namespace) -> int:
    """Fine-tune with every method and compare."""
    from pyfastft import demo as demonstration

    return demonstration.run(args)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="pyfastft",
        description=pyfastft.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"pyfastft {pyfastft.__version__}")
    top.set_defaults(run=doctor, json=False, no_selftest=False)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command("doctor", doctor, "what runs on this machine and why the rest does not")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--no-selftest", action="store_true", help="only look, run nothing")

    from pyfastft.demo import add_arguments

    add_arguments(command("demo", demo, "fine-tune with every method and compare", _DEMO_EXAMPLES))
    _add_bench(command)
    return top


def _add_bench(command: Callable[..., argparse.ArgumentParser]) -> None:
    summary = "measure the kernels beside their peers"
    try:
        from pyfastft.benchmarks import cli
    except ImportError as error:
        reason = str(error)

        def unavailable(args: argparse.Namespace) -> NoReturn:
            raise UsageError(f"bench: the benchmarks cannot be imported: {reason}")

        command("bench", unavailable, f"{summary} (not importable here)")
        return
    cli.add_arguments(command("bench", cli.run, summary))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except UsageError as error:
        print(f"pyfastft: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyfastft: interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
