"""masked_weight_grad from the whole gradient."""

from __future__ import annotations

import torch

from pyfastft._op import implement
from pyfastft.ops.masked._rectangles import check_index, offsets_of


@implement("masked_weight_grad", "reference")
def masked_weight_grad(
    values: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    rows: int,
    columns: int,
) -> None:
    n, k = grad.shape[-1], x.shape[-1]
    check_index("masked_weight_grad", index, rows, columns, n, k)
    m = grad[..., 0].numel() if n else 0
    whole = grad.reshape(m, n).T @ x.reshape(m, k) if n and k else grad.new_zeros(n, k)
    values.copy_(whole.reshape(-1)[offsets_of(index, rows, columns, k)])
