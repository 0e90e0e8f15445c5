"""The lora family's truth. Symbols as in ``ops/lora.md``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.reference._dropout import dropout


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a matrix, its leading dimensions as one; empty ones too."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


@implement("lora_linear", "reference")
def lora_linear(
    y: torch.Tensor,
    xa: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
) -> None:
    """y = x W^T + b + s * (x_hat A^T) B^T."""
    x2 = rows(x)
    s = dropout(x2, p, rng).to(lora_a.dtype) @ lora_a.T
    base = torch.nn.functional.linear(x2, weight, bias)
    y.copy_((base + s @ lora_b.T * scaling.reshape(())).view_as(y))
    xa.copy_(s.view_as(xa))


@implement("lora_linear_backward", "reference")
def lora_linear_backward(
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dlora_a: torch.Tensor,
    dlora_b: torch.Tensor,
    dbias: torch.Tensor,
    dscaling: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    need: Sequence[bool],
) -> None:
    """T = dY B; dX = dY W + s * dropout(T A), dA = s T^T x_hat, dB = s dY^T S, ds = sum(T * S)."""
    dy = rows(grad)
    s = scaling.reshape(()).to(lora_a.dtype)
    t = dy.to(lora_b.dtype) @ lora_b
    if need[0]:
        # The mask is symmetric: the gradient through dropout is dropout of the gradient.
        lora = dropout(s * t @ lora_a, p, rng)
        dx.copy_((dy @ weight + lora).view_as(dx))
    if need[1]:
        assert x is not None
        dweight.copy_(dy.T @ rows(x))
    if need[2]:
        assert x is not None
        dlora_a.copy_((s * t).T @ dropout(rows(x), p, rng).to(lora_a.dtype))
    if need[3]:
        assert xa is not None
        dlora_b.copy_(s * (dy.to(xa.dtype).T @ rows(xa)))
    if need[4]:
        dbias.copy_(dy.sum(0))
    if need[5]:
        assert xa is not None
        dscaling.copy_((t * rows(xa)).sum().reshape(dscaling.shape))
