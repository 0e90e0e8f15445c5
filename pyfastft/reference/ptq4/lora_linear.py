"""int4_lora_linear and its gradients: lora_linear's on the weight that the codes stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.reference.lora import linear as lora
from pyfastft.reference.lora.linear import rows
from pyfastft.reference.ptq4.dequantize import dequantized
from pyfastft.reference.ptq4.linear import grid_gradients


@implement("int4_lora_linear", "reference")
def int4_lora_linear(
    y: torch.Tensor,
    xa: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
) -> None:
    """y = x W^T + b + s * (dropout(x) A^T) B^T."""
    weight = dequantized(codes, scale, zero, perm, x.shape[-1], group_size, codebook, x.dtype)
    lora.lora_linear(y, xa, x, weight, lora_a, lora_b, bias, scaling, p, rng, None, None, None)


@implement("int4_lora_linear_backward", "reference")
def int4_lora_linear_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dzero: torch.Tensor,
    dlora_a: torch.Tensor,
    dlora_b: torch.Tensor,
    dbias: torch.Tensor,
    dscaling: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
    need: Sequence[bool],
) -> None:
    """The gradients of lora_linear, and those of scale and zero."""
    weight = None
    if need[0]:
        k = lora_a.shape[1]
        weight = dequantized(codes, scale, zero, perm, k, group_size, codebook, grad.dtype)
    none = grad.new_empty(0)
    lora.lora_linear_backward(
        dx,
        none,
        dlora_a,
        dlora_b,
        dbias,
        dscaling,
        none,
        grad,
        x,
        weight,
        lora_a,
        lora_b,
        xa,
        scaling,
        p,
        rng,
        None,
        None,
        None,
        (need[0], False, need[3], need[4], need[5], need[6], False),
    )
    if need[1] or need[2]:
        assert x is not None
        wanted = dscale if need[1] else None, dzero if need[2] else None
        grid_gradients(*wanted, rows(grad), rows(x), codes, scale, zero, perm, group_size, codebook)
