"""DoRA's row norms and column scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._op import implement
from pyfastft.reference.lora.linear import rows


@implement("dora_norm", "reference")
def dora_norm(
    norm: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    squared: torch.Tensor | None,
) -> None:
    """norm^2 = |W|^2 + 2 s (B * W A^T) 1 + s^2 (B * B A A^T) 1."""
    w, a, b = (t.to(norm.dtype) for t in (weight, lora_a, lora_b))
    s = scaling.reshape(())
    if squared is None:
        squared = w.square().sum(1)
    cross = (b * (w @ a.T)).sum(1)
    own = (b * (b @ (a @ a.T))).sum(1)
    norm.copy_((squared + 2 * s * cross + s * s * own).clamp_min(0).sqrt())


@implement("scale_columns", "reference")
def scale_columns(
    y: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    scaled = x * scale
    y.copy_(scaled if bias is None else scaled + bias)


@implement("scale_columns_backward", "reference")
def scale_columns_backward(
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dbias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    scale: torch.Tensor,
    need: Sequence[bool],
) -> None:
    if need[0]:
        dx.copy_(grad * scale)
    if need[1]:
        assert x is not None
        dscale.copy_((rows(grad).to(scale.dtype) * rows(x)).sum(0))
    if need[2]:
        dbias.copy_(rows(grad).sum(0))
