"""abs_row_sums and its sub-gradient, with the whole matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement


def _difference(u: torch.Tensor, v: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    product = u @ v.T
    return product if w is None else product - w


@implement("abs_row_sums", "reference")
def abs_row_sums(
    sums: torch.Tensor, u: torch.Tensor, v: torch.Tensor, w: torch.Tensor | None
) -> None:
    sums.copy_(_difference(u, v, w).abs().sum(1, dtype=sums.dtype))


@implement("abs_row_sums_backward", "reference")
def abs_row_sums_backward(
    du: torch.Tensor,
    dv: torch.Tensor,
    dw: torch.Tensor,
    grad: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor | None,
    need: Sequence[bool],
) -> None:
    z = (_difference(u, v, w).sign() * grad[:, None]).to(u.dtype)
    if need[0]:
        du.copy_(z @ v)
    if need[1]:
        dv.copy_(z.T @ u)
    if need[2]:
        dw.copy_(-z)
