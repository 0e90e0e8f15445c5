"""lora_adapters on the CPU library."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.lora._layers import (
    adapter,
    address_of,
    contiguous,
    cpu_unsupported,
    layer,
    optional,
    or_nones,
    refuse_packed,
    structs,
)

_Tensors = Sequence[torch.Tensor]


@implement("lora_adapters", "cpu", unsupported=cpu_unsupported)
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
    n, k = weight.shape
    lora_a, lora_b, rng = contiguous(lora_a), contiguous(lora_b), optional(rng)
    bias, packed, packed_dx = optional(bias), optional(packed), optional(packed_dx)
    base = structs([layer(n, y=y, weight=weight, bias=bias, packed=packed, packed_dx=packed_dx)])
    begins = accumulate(lengths, initial=0)
    adapters = structs(
        adapter(a, b, s, p_j, begin, length, xa=xa)
        for a, b, s, p_j, begin, length, xa in zip(
            lora_a, lora_b, scaling, p, begins, lengths, xas, strict=False
        )
    )
    try:
        _native.cpu().lora_adapters(
            layer=address_of(base),
            adapters=address_of(adapters),
            x=x.data_ptr(),
            rng=address(rng),
            count=len(lora_a),
            m=x.shape[0],
            k=k,
            x_stride_m=x.stride(0),
            x_stride_k=x.stride(1),
            dtype=DTYPES[x.dtype],
            adapter_dtype=DTYPES[lora_a[0].dtype],
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_packed("lora_adapters", error, (packed, packed_dx))


@implement("lora_adapters_backward", "cpu", unsupported=cpu_unsupported)
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
    n, k = weight.shape
    lora_a, lora_b, xas = contiguous(lora_a), contiguous(lora_b), contiguous(xas)
    rng, packed, packed_dx = optional(rng), optional(packed), optional(packed_dx)
    # An output that is not needed has no elements: its address is null, and it is not computed.
    base = structs(
        [
            layer(
                n,
                dweight=dweight,
                dbias=dbias,
                grad=grad,
                weight=weight,
                packed=packed,
                packed_dx=packed_dx,
            )
        ]
    )
    begins = accumulate(lengths, initial=0)
    adapters = structs(
        adapter(a, b, s, p_j, begin, length, xa=xa, dlora_a=da, dlora_b=db, dscaling=ds)
        for a, b, s, p_j, begin, length, xa, da, db, ds in zip(
            lora_a,
            lora_b,
            scaling,
            p,
            begins,
            lengths,
            or_nones(xas, len(lora_a)),
            dlora_a,
            dlora_b,
            dscaling,
            strict=False,
        )
    )
    x_stride_m, x_stride_k = (0, 0) if x is None else x.stride()
    try:
        _native.cpu().lora_adapters_backward(
            dx=dx.data_ptr(),
            layer=address_of(base),
            adapters=address_of(adapters),
            x=address(x),
            rng=address(rng),
            count=len(lora_a),
            m=grad.shape[0],
            k=k,
            x_stride_m=x_stride_m,
            x_stride_k=x_stride_k,
            dtype=DTYPES[grad.dtype],
            adapter_dtype=DTYPES[lora_a[0].dtype],
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_packed("lora_adapters_backward", error, (packed, packed_dx))
