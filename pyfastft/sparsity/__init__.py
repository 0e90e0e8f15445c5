"""The trained parts of weights, each one object, and how they are chosen and changed."""

from pyfastft.sparsity.changes import regrow, restored
from pyfastft.sparsity.layouts import blocks, columns, elements, hashed, heads, nonzero, rows, whole
from pyfastft.sparsity.model import sets_of
from pyfastft.sparsity.sara import SaRA, polar_factor
from pyfastft.sparsity.selection import select
from pyfastft.sparsity.set import SparseSet, pack

__all__ = [
    "SaRA",
    "SparseSet",
    "blocks",
    "columns",
    "elements",
    "hashed",
    "heads",
    "nonzero",
    "pack",
    "polar_factor",
    "regrow",
    "restored",
    "rows",
    "select",
    "sets_of",
    "whole",
]
