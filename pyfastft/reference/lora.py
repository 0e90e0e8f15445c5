"""The lora family's truth. Symbols as in ``ops/lora.md``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.reference._dropout import dropout


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
    x2 = x.reshape(-1, weight.shape[1])
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
    n, k = weight.shape
    r = lora_a.shape[0]
    dy = grad.reshape(-1, n)
    s = scaling.reshape(()).to(lora_a.dtype)
    t = dy.to(lora_b.dtype) @ lora_b
    if need[0]:
        # The mask is symmetric: the gradient through dropout is dropout of the gradient.
        lora = dropout(s * t @ lora_a, p, rng)
        dx.copy_((dy @ weight + lora).view_as(dx))
    if need[1]:
        assert x is not None
        dweight.copy_(dy.T @ x.reshape(-1, k))
    if need[2]:
        assert x is not None
        dlora_a.copy_((s * t).T @ dropout(x.reshape(-1, k), p, rng).to(lora_a.dtype))
    if need[3]:
        assert xa is not None
        dlora_b.copy_(s * (dy.to(xa.dtype).T @ xa.reshape(-1, r)))
    if need[4]:
        dbias.copy_(dy.sum(0))
    if need[5]:
        assert xa is not None
        dscaling.copy_((t * xa.reshape(-1, r)).sum().reshape(dscaling.shape))
