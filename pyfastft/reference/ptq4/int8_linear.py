"""int8_linear and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from pyfastft._op import implement
from pyfastft.reference.lora.linear import rows


def _weight(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.to(scale.dtype) * scale[:, None]).to(dtype)


@implement("int8_linear", "reference")
def int8_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    rows(y).copy_(F.linear(rows(x), _weight(codes, scale, x.dtype), bias))


@implement("int8_linear_backward", "reference")
def int8_linear_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dbias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    need: Sequence[bool],
) -> None:
    g = rows(grad)
    if need[0]:
        rows(dx).copy_(g @ _weight(codes, scale, grad.dtype))
    if need[1]:
        assert x is not None
        dscale.copy_(((g.T @ rows(x)).to(scale.dtype) * codes).sum(1))
    if need[2]:
        dbias.copy_(g.sum(0))
