"""Pruned models: made smaller by what pruning left without use, or multiplied by blocks."""

from pyfastft.pruning.pattern import BlockPattern

__all__ = ["BlockPattern"]
