"""The masked family's truth, one file per op. Symbols as in ``ops/masked.md``."""

from pyfastft.reference.masked import entries, select, step, weight_grad

__all__ = ["entries", "select", "step", "weight_grad"]
