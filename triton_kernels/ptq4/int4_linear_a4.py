"""int4_linear_a4 on Triton."""

from __future__ import annotations

import torch

from pyfastft._op import implement
from pyfastft.triton_kernels.ptq4 import _rounded
from pyfastft.triton_kernels.ptq4.int4_linear_a8 import run


@implement("int4_linear_a4", "triton", unsupported=_rounded.unsupported)
def int4_linear_a4(
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    group_size: int,
) -> None:
    run(y, x, codes, scale, zero, bias, perm, (x_scale, x_zero), group_size)
