"""lora_projections: lora_linear of each, and the sum of their dX."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.reference.lora import linear

_Tensors = Sequence[torch.Tensor]


def stream(rng: torch.Tensor | None, j: int) -> torch.Tensor | None:
    """(seed + j, offset): what projection j draws with."""
    return None if rng is None else rng + rng.new_tensor([j, 0])


@implement("lora_projections", "reference")
def lora_projections(
    ys: _Tensors,
    xas: _Tensors,
    x: torch.Tensor,
    weights: _Tensors,
    lora_a: _Tensors,
    lora_b: _Tensors,
    biases: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    rng: torch.Tensor | None,
    packed: _Tensors,
    packed_dx: _Tensors,
) -> None:
    operands = zip(ys, xas, weights, lora_a, lora_b, biases, scaling, p, strict=True)
    for j, (y, xa, w, a, b, bias, s, p_j) in enumerate(operands):
        bias_j = bias if bias.numel() else None
        linear.lora_linear(y, xa, x, w, a, b, bias_j, s, p_j, stream(rng, j), None, None, None)


@implement("lora_projections_backward", "reference")
def lora_projections_backward(
    dx: torch.Tensor,
    dweights: _Tensors,
    dlora_a: _Tensors,
    dlora_b: _Tensors,
    dbiases: _Tensors,
    dscaling: _Tensors,
    grads: _Tensors,
    x: torch.Tensor | None,
    weights: _Tensors,
    lora_a: _Tensors,
    lora_b: _Tensors,
    xas: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    rng: torch.Tensor | None,
    packed: _Tensors,
    packed_dx: _Tensors,
    need: Sequence[bool],
) -> None:
    parts: list[torch.Tensor] = []
    for j, grad in enumerate(grads):
        part = torch.empty_like(dx)
        linear.lora_linear_backward(
            part,
            dweights[j],
            dlora_a[j],
            dlora_b[j],
            dbiases[j],
            dscaling[j],
            dx.new_empty(0),
            grad,
            x,
            weights[j],
            lora_a[j],
            lora_b[j],
            xas[j] if xas else None,
            scaling[j],
            p[j],
            stream(rng, j),
            None,
            None,
            None,
            [need[0], *need[1 + 5 * j : 6 + 5 * j], False],
        )
        parts.append(part)
    if need[0]:
        dx.copy_(torch.stack(parts).sum(0))
