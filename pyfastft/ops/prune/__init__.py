"""The prune family's contracts, one file per op. The derivation is in ``../prune.md``."""

from pyfastft.ops.prune.linear import (
    BlockSparseLinearFunction,
    block_sparse_linear,
    block_sparse_linear_backward,
)

__all__ = ["BlockSparseLinearFunction", "block_sparse_linear", "block_sparse_linear_backward"]
