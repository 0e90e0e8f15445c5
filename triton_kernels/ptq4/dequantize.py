"""int4_dequantize on Triton."""

from __future__ import annotations

from typing import Any

import torch

from pyfastft._op import implement
from pyfastft.native import _torch_int4
from pyfastft.triton_kernels._common import why_no_triton
from pyfastft.triton_kernels.ptq4 import _kernels


def _unsupported(
    codes: torch.Tensor, scale: torch.Tensor, zero: Any, perm: Any, k: int, *rest: Any
) -> str | None:
    dtype = rest[-1]
    return why_no_triton(codes) or _torch_int4.why_dtypes(dtype, scale.dtype)


@implement("int4_dequantize", "triton", unsupported=_unsupported)
def int4_dequantize(weight: torch.Tensor, codes: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(codes):
        _torch_int4.dequantize(_kernels.dequantize, weight, codes, *args)
