"""Training a part of a weight: its gradient, its optimizer steps, its selection, its entries.

The trained part is equal rectangles of ``rows`` x ``columns``, given by ``index``, the flat offsets
of their first elements (:mod:`pyfastft.sparsity` makes and keeps them). A single element is a
rectangle of 1 x 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._random import draw_rng
from pyfastft.ops import masked as ops
from pyfastft.ops.masked.linear import MaskedLinearFunction


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    *,
    rows: int = 1,
    columns: int = 1,
    bias: torch.Tensor | None = None,
    saved_columns: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""A plain linear layer whose weight gets its gradient at the trained entries only.

    .. math::
        y = x W^T + b, \quad
        \frac{\partial L}{\partial \mathrm{values}} = (dY^T X)|_{\mathrm{index}}

    Args:
        x: input of shape (..., K); float32, bfloat16, float16 or float64, any strides.
        weight: W of shape (N, K), of x's dtype, C-contiguous. It requires no gradient.
        values: the trained entries, of shape (count * rows * columns,): float32 (float64 beside
            float64). Only its gradient is computed here; the forward reads W, where the same values
            stand.
        index: ascending flat offsets of the rectangles in W, int32 or int64; with
            ``saved_columns``, in the (N, C) matrix of those columns.
        rows, columns: the size of a rectangle, which tiles that matrix.
        bias: b of shape (N,), of x's dtype.
        saved_columns: C ascending columns of W, int64: all that index has. Only these columns of x
            are saved for the backward.

    Returns:
        y of shape (..., N), of x's dtype. Under autocast x, W and b are cast, as those of a plain
        linear layer are.

    Raises:
        ValueError: W requires a gradient, a shape does not fit, or (in the backward) the offsets do
            not ascend or leave the matrix.
        TypeError: a dtype does not fit.

    Note:
        dW is never formed, and beside the gradients the backward takes scratch that grows with
        N + K and not with N K: packed or transposed operands of some hundred tokens. For small
        layers that can exceed dW. The gradient of the values has the same bits whatever the number
        of threads.

    Reference:
        Nikdan et al. 2024, "RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation",
        section 4.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return MaskedLinearFunction.apply(
                x, weight, bias, values, index, rows, columns, saved_columns
            )
    return MaskedLinearFunction.apply(x, weight, bias, values, index, rows, columns, saved_columns)


def masked_weight_grad(
    grad: torch.Tensor, x: torch.Tensor, index: torch.Tensor, *, rows: int = 1, columns: int = 1
) -> torch.Tensor:
    r"""The gradient of a linear layer's weight at some rectangles of it.

    .. math:: \mathrm{values} = (dY^T X)|_{\mathrm{index}}

    Args:
        grad: dY of shape (..., N); float32, bfloat16, float16 or float64, any strides.
        x: X of shape (..., K), of grad's dtype.
        index: ascending flat offsets of the rectangles in an (N, K) matrix, int32 or int64.
        rows, columns: the size of a rectangle, which tiles that matrix.

    Returns:
        values of shape (count * rows * columns,), float32 (float64 beside float64), rectangle by
        rectangle, each row after row.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`pyfastft.lora_linear`; ValueError too
            where the offsets do not ascend, leave the matrix, or are off the grid.

    Reference:
        Nikdan et al. 2024, "RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation",
        section 4.
    """
    return ops.masked_weight_grad(grad, x, index, rows, columns)


def select_topk(
    tensors: Sequence[torch.Tensor] | torch.Tensor,
    k: int,
    *,
    score: str = "magnitude",
    largest: bool = True,
    others: Sequence[torch.Tensor] = (),
    exclude: Sequence[torch.Tensor] = (),
    rng: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    r"""The k best entries of several tensors together, exactly, without a score tensor.

    .. math:: S = \operatorname*{top-}k_{(t, i)} \; s(a_{t,i}, b_{t,i})

    Of equal scores the first entries are taken, in the order of the tensors; NaN scores come last.

    Args:
        tensors: a, of float32, bfloat16, float16 or float64 and any shapes.
        k: how many of them all.
        score: "magnitude" :math:`|a|`, "square" :math:`a^2`, "value" a, "product" :math:`|a b|`,
            "movement" :math:`-a b`, "difference" :math:`|a - b|`, "wanda" :math:`|a_{nk}| b_k`, or
            "random", a number drawn for each position. Computed in float32.
        largest: the largest scores, or the smallest.
        others: b, one for each tensor where the score reads one: of its shape and dtype, or for
            "wanda" float32 of shape (K,).
        exclude: for each tensor ascending flat offsets that are left out; or none.
        rng: int64 tensor (seed, offset) of a random score. Drawn from torch's generator where
            absent.

    Returns:
        For each tensor the ascending flat offsets selected, int64.

    Raises:
        ValueError: k exceeds what there is to select from, or a shape does not fit.
        TypeError: a dtype does not fit.
        NotImplementedError: no backend can run the arguments.

    Reference:
        Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
        equation 1 (Wanda); Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection
        Sensitivity", equation 6; Sanh et al. 2020, "Movement Pruning", section 4.
    """
    several = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    if score == "random" and rng is None and several:
        rng = draw_rng(several[0].device)
    index, counts = ops.select_topk(several, list(others), list(exclude), k, score, largest, rng)
    first, offsets = 0, []
    for tensor, own in zip(several, index.split(counts.tolist()), strict=True):
        offsets.append(own - first)
        first += tensor.numel()
    return offsets


def masked_gather(
    weight: torch.Tensor, index: torch.Tensor, *, rows: int = 1, columns: int = 1
) -> torch.Tensor:
    r"""A weight's entries at some rectangles of it, bit for bit.

    .. math:: \mathrm{values} = W|_{\mathrm{index}}

    Args:
        weight: W of shape (N, ...), C-contiguous, of any float dtype.
        index: ascending flat offsets of the rectangles, int32 or int64.
        rows, columns: the size of a rectangle, which tiles W as a matrix (N, K).

    Returns:
        values of shape (count * rows * columns,), of W's dtype.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`masked_weight_grad`.

    Reference:
        Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", section 3.
    """
    return ops.masked_gather(weight, index, rows, columns)


def masked_scatter_(
    weight: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    *,
    rows: int = 1,
    columns: int = 1,
    alpha: float | None = None,
) -> torch.Tensor:
    r"""Write some rectangles of a weight, or add to them, in place.

    .. math:: W|_{\mathrm{index}} \leftarrow \mathrm{values} \quad \text{or} \quad
        W|_{\mathrm{index}} \leftarrow W|_{\mathrm{index}} + \alpha\, \mathrm{values}

    Args:
        weight: W of shape (N, ...), C-contiguous, of any float dtype.
        values: of shape (count * rows * columns,), of W's dtype or float32; rounded once. Of W's
            dtype they are written bit for bit, so what :func:`masked_gather` returned restores W.
        index: ascending flat offsets of the rectangles, int32 or int64.
        rows, columns: the size of a rectangle, which tiles W as a matrix (N, K).
        alpha: add this multiple of the values, in float32; absent, replace.

    Returns:
        weight.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`masked_weight_grad`; W is untouched.

    Reference:
        Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", section 3.
    """
    ops.masked_scatter_(weight, values, index, rows, columns, alpha)
    return weight


def masked_merge(
    index: torch.Tensor, kept: torch.Tensor, grown: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""An index after some of its entries were dropped and others grown.

    .. math:: \mathrm{merged} = \mathrm{index}[\mathrm{kept}] \cup \mathrm{grown}

    Args:
        index: ascending offsets, int32 or int64.
        kept: ascending places in index, int64: those that stay.
        grown: ascending offsets of index's dtype, none of those that stay.

    Returns:
        merged, ascending, and source, int64: each entry's place in index, -1 where it was grown.
        What belongs to the entries follows as ``torch.where(source >= 0, old[source], seed)``.

    Raises:
        ValueError: a list does not ascend, or an entry is both kept and grown.
        TypeError: a dtype does not fit.
        NotImplementedError: no backend can run the arguments.

    Reference:
        Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", algorithm 1.
    """
    return ops.masked_merge(index, kept, grown)
