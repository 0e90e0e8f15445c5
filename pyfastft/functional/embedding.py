"""An embedding with a low-rank update."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pyfastft._check import FLOATS, expect_dense, expect_dtype, expect_shape, reject
from pyfastft.functional._arguments import as_scaling
from pyfastft.ops.lora._operands import wide


def lora_embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scaling: float | torch.Tensor = 1.0,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    r"""An embedding with a low-rank update of its table.

    .. math:: y = E_i + s \cdot A_{:, i}^T B^T

    Args:
        indices: i of any shape, int64 or int32.
        weight: E of shape (V, D).
        lora_a: A of shape (R, V), of E's dtype, or float32 beside a half-precision E.
        lora_b: B of shape (D, R), of A's dtype.
        scaling: s; a tensor of one element can change without recompilation.
        padding_idx: the row of E, and column of A, that gets no gradient.
        max_norm, norm_type: the rows of E and the columns of A that are looked up are shortened in
            place to this norm, as PEFT does.
        scale_grad_by_freq: divide the gradients of E and A by how often an index occurs.
        sparse: let E's gradient be sparse; A's cannot, whose rows are not what is looked up.

    Returns:
        y of shape (\*indices, D), of E's dtype.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.
        IndexError: an index is not in the table; torch's.

    Reference:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; its embedding as in
        the authors' loralib.
    """
    op = "lora_embedding"
    expect_dense(op, None, weight=weight)
    expect_dense(op, weight.device, indices=indices, lora_a=lora_a, lora_b=lora_b)
    expect_dtype(op, "indices", indices, (torch.int64, torch.int32))
    expect_dtype(op, "weight", weight, FLOATS)
    expect_shape(op, "weight", weight, ("V", "D"))
    v, d = weight.shape
    if lora_a.dim() != 2 or lora_a.shape[1] != v or lora_a.shape[0] < 1:
        reject(op, "lora_a", f"shape (R, {v}), R at least 1", tuple(lora_a.shape))
    expect_shape(op, "lora_b", lora_b, (d, lora_a.shape[0]), "to match weight and lora_a")
    expect_dtype(op, "lora_a", lora_a, (weight.dtype, wide(weight.dtype)), "beside weight")
    expect_dtype(op, "lora_b", lora_b, (lora_a.dtype,), "to match lora_a")
    options = (padding_idx, max_norm, norm_type, scale_grad_by_freq)
    base = F.embedding(indices, weight, *options, sparse)
    ranks = F.embedding(indices, lora_a.T, *options)
    up = (lora_b * as_scaling(scaling, weight).to(lora_b.dtype)).T
    # The sum stays in the table's precision under autocast, as F.embedding does.
    with torch.autocast(weight.device.type, enabled=False):
        y = torch.addmm(base.reshape(-1, d).to(up.dtype), ranks.reshape(-1, up.shape[0]), up)
    return y.to(base.dtype).view(base.shape)
