"""lora_linear and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.reference._dropout import dropout


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a matrix, its leading dimensions as one; empty ones too."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _base(
    weight: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
    like: torch.Tensor,
    n: int,
    k: int,
) -> torch.Tensor | None:
    """W, from a packed form where it is only there; None where there is no base product."""
    if weight is not None:
        return weight
    from pyfastft.native import _packing

    if packed is not None:
        return _packing.unpack(packed, n, k, like.dtype)
    if packed_dx is None:
        return None
    # In the weight's own layout, so that torch sums in the same order.
    return _packing.unpack(packed_dx, k, n, like.dtype).T.contiguous()


@implement("lora_linear", "reference")
def lora_linear(
    y: torch.Tensor,
    xa: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    gate: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
) -> None:
    """y = x W^T + b + s * ((x_hat A^T) * g) B^T."""
    x2 = rows(x)
    weight = _base(weight, packed, packed_dx, x, lora_b.shape[0], lora_a.shape[1])
    s = dropout(x2, p, rng).to(lora_a.dtype) @ lora_a.T
    u = s if gate is None else s * rows(gate)
    result = u @ lora_b.T * scaling.reshape(())
    if weight is not None:
        result = torch.nn.functional.linear(x2, weight, bias) + result
    elif bias is not None:
        result = bias + result
    y.copy_(result.view_as(y))
    xa.copy_(s.view_as(xa))


@implement("lora_linear_backward", "reference")
def lora_linear_backward(
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dlora_a: torch.Tensor,
    dlora_b: torch.Tensor,
    dbias: torch.Tensor,
    dscaling: torch.Tensor,
    dgate: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    gate: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
    need: Sequence[bool],
) -> None:
    """T = dY B, V = T * g and U = S * g;  dX = dY W + s * dropout(V A), dA = s V^T x_hat,

    dB = s dY^T U, ds = sum(T * U), dg = s T * S, over the rows where g has none.
    """
    dy = rows(grad)
    s = scaling.reshape(()).to(lora_a.dtype)
    t = dy.to(lora_b.dtype) @ lora_b
    v = t if gate is None else t * rows(gate)
    u = None if xa is None else rows(xa)
    if u is not None and gate is not None:
        u = u * rows(gate)
    if need[0]:
        # The mask is symmetric: the gradient through dropout is dropout of the gradient.
        result = dropout(s * v @ lora_a, p, rng)
        weight = _base(weight, packed, packed_dx, grad, lora_b.shape[0], lora_a.shape[1])
        if weight is not None:
            result = dy @ weight + result
        dx.copy_(result.view_as(dx))
    if need[1]:
        assert x is not None
        dweight.copy_(dy.T @ rows(x))
    if need[2]:
        assert x is not None
        dlora_a.copy_((s * v).T @ dropout(rows(x), p, rng).to(lora_a.dtype))
    if need[3]:
        assert u is not None
        dlora_b.copy_(s * (dy.to(u.dtype).T @ u))
    if need[4]:
        dbias.copy_(dy.sum(0))
    if need[5]:
        assert u is not None
        dscaling.copy_((t * u).sum().reshape(dscaling.shape))
    if need[6]:
        assert xa is not None
        per_row = s * t * rows(xa)
        dgate.copy_(per_row.sum(0) if dgate.dim() == 1 else per_row.view_as(dgate))
