"""Linear layers of pruned weights."""

from __future__ import annotations

import torch

from pyfastft import ops
from pyfastft._check import reject
from pyfastft.pruning.pattern import BlockPattern


def block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    pattern: BlockPattern,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""A linear layer whose weight is made of blocks; the others are zero and cost nothing.

    .. math:: y = x W^T + b, \qquad W_{ij} = \mathrm{values}_{\mathrm{pattern}(i, j)}

    Args:
        x: input of shape (..., K); float32, bfloat16, float16 or float64, any strides.
        values: the blocks of W, of shape (blocks, rows, columns) and x's dtype, in the pattern's
            order. Their gradient is computed at these blocks only.
        pattern: which blocks of W (N, K) there are.
        bias: b of shape (N,), of x's dtype.

    Returns:
        y of shape (..., N), of x's dtype. Accumulated in float32 (float64 for float64).

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.
        NotImplementedError: no backend can run the arguments; lists every backend's reason.

    Note:
        The same bits every time, and on CPU whatever the number of threads. Where a block reaches
        beyond W its values are not read there, and have the gradient 0. The backward saves x alone;
        it cannot be differentiated again.

    Reference:
        Lagunas et al. 2021, "Block Pruning For Faster Transformers", section 3; Gale et al. 2023,
        "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", section 5.1.
    """
    op = "block_sparse_linear"
    n, k = pattern.shape
    if x.shape[-1:] != (k,):
        because = f"to match a pattern of shape ({n}, {k})"
        reject(op, "x", f"shape (..., {k})", tuple(x.shape), because=because)
    if values.shape[1:] != pattern.block:
        what = f"shape (blocks, {pattern.block[0]}, {pattern.block[1]})"
        reject(op, "values", what, tuple(values.shape), because="to match the pattern")
    return ops.block_sparse_linear(x, values, bias, pattern.index, n)
