"""int4_linear_a8 on Triton."""

from __future__ import annotations

import torch

from pyfastft._op import implement
from pyfastft.reference.lora.linear import rows
from pyfastft.triton_kernels.ptq4 import _rounded


@implement("int4_linear_a8", "triton", unsupported=_rounded.unsupported)
def int4_linear_a8(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    group_size: int,
) -> None:
    run(y, x, codes, scale, zero, bias, perm, None, group_size)


def run(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    learned: tuple[torch.Tensor, torch.Tensor] | None,
    group_size: int,
) -> None:
    """The product, or without columns of x the bias alone."""
    if y.numel() == 0:
        return
    if x.shape[-1] == 0:
        y.zero_() if bias is None else y.copy_(bias.expand_as(y))
        return
    with torch.cuda.device_of(x):
        _rounded.linear(rows(y), rows(x), codes, scale, zero, bias, perm, learned, group_size)
