"""``python -m pyfastft.benchmarks``: the same as ``pyfastft bench``."""

import argparse
import sys

from pyfastft._cli import UsageError
from pyfastft.benchmarks import cli

parser = argparse.ArgumentParser(prog="python -m pyfastft.benchmarks", description=cli.__doc__)
cli.add_arguments(parser)
try:
    sys.exit(cli.run(parser.parse_args()))
except UsageError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
