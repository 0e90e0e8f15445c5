"""The quantizers on the CPU library."""

from __future__ import annotations

import torch

from pyfastft import _native
from pyfastft._codebook import TABLES
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.lora._layers import cpu_unsupported


def _with_unit_stride(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.stride(1) == 1 or weight.shape[1] <= 1 else weight.contiguous()


@implement("rtn_quantize", "cpu", unsupported=cpu_unsupported)
def rtn_quantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    group_size: int,
    codebook: str,
    symmetric: bool,
    grid: int,
    scale_dtype: torch.dtype,
) -> None:
    weight = _with_unit_stride(weight)
    values = None if codebook == "int4" else torch.tensor(TABLES[codebook])
    _native.cpu().rtn_quantize(
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        zero=zero.data_ptr(),
        weight=weight.data_ptr(),
        table=address(values),
        n=weight.shape[0],
        k=weight.shape[1],
        group_size=group_size,
        weight_stride_n=weight.stride(0),
        symmetric=int(symmetric),
        grid=grid,
        dtype=DTYPES[weight.dtype],
        scale_dtype=DTYPES[scale_dtype],
        threads=torch.get_num_threads(),
    )


@implement("hqq_quantize", "cpu", unsupported=cpu_unsupported)
def hqq_quantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    group_size: int,
    round_zero: bool,
    iterations: int,
    power: float,
    beta: float,
    kappa: float,
    scale_dtype: torch.dtype,
) -> None:
    weight = _with_unit_stride(weight)
    options = torch.tensor([power, beta, kappa], dtype=torch.float32)
    _native.cpu().hqq_quantize(
        codes=codes.data_ptr(),
        scale=scale.data_ptr(),
        zero=zero.data_ptr(),
        weight=weight.data_ptr(),
        options=options.data_ptr(),
        n=weight.shape[0],
        k=weight.shape[1],
        group_size=group_size,
        weight_stride_n=weight.stride(0),
        round_zero=int(round_zero),
        iterations=iterations,
        dtype=DTYPES[weight.dtype],
        scale_dtype=DTYPES[scale_dtype],
        threads=torch.get_num_threads(),
    )
