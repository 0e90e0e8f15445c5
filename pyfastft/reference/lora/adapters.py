"""lora_adapters: lora_linear on the rows of each adapter, the base on the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.reference.lora import linear
from pyfastft.reference.lora.projections import stream

_Tensors = Sequence[torch.Tensor]


@implement("lora_adapters", "reference")
def lora_adapters(
    y: torch.Tensor,
    xas: _Tensors,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: _Tensors,
    lora_b: _Tensors,
    bias: torch.Tensor | None,
    scaling: _Tensors,
    p: Sequence[float],
    lengths: Sequence[int],
    rng: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
) -> None:
    begin = 0
    for j, length in enumerate(lengths):
        own = slice(begin, begin + length)
        linear.lora_linear(
            y[own],
            xas[j],
            x[own],
            weight,
            lora_a[j],
            lora_b[j],
            bias,
            scaling[j],
            p[j],
            stream(rng, j),
            None,
            None,
            None,
        )
        begin += length
    y[begin:] = torch.nn.functional.linear(x[begin:], weight, bias)


@implement("lora_adapters_backward", "reference")
def lora_adapters_backward(
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dlora_a: _Tensors,
    dlora_b: _Tensors,
    dbias: torch.Tensor,
    dscaling: _Tensors,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_a: _Tensors,
    lora_b: _Tensors,
    xas: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    lengths: Sequence[int],
    rng: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
    need: Sequence[bool],
) -> None:
    begin, nothing = 0, grad.new_empty(0)
    for j, length in enumerate(lengths):
        own = slice(begin, begin + length)
        linear.lora_linear_backward(
            dx[own] if need[0] else nothing,
            nothing,
            dlora_a[j],
            dlora_b[j],
            nothing,
            dscaling[j],
            nothing,
            grad[own],
            None if x is None else x[own],
            weight,
            lora_a[j],
            lora_b[j],
            xas[j] if xas else None,
            scaling[j],
            p[j],
            stream(rng, j),
            None,
            None,
            None,
            [need[0], False, need[3 + 3 * j], need[4 + 3 * j], False, need[5 + 3 * j], False],
        )
        begin += length
    if need[0]:
        dx[begin:] = grad[begin:] @ weight
    if need[1]:
        assert x is not None
        dweight.copy_(grad.T @ x)
    if need[2]:
        dbias.copy_(grad.sum(0))
