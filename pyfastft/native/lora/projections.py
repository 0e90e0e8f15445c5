"""lora_projections on the CPU library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    rows,
    structs,
)

_Tensors = Sequence[torch.Tensor]
_MOST = 16  # kMaxProjections of csrc/cpu/lora/linear.h


@implement("lora_projections", "cpu", unsupported=cpu_unsupported)
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
    count, k = len(weights), weights[0].shape[1]
    m = x.shape[:-1].numel()
    x, rng = rows(x, m, k), optional(rng)
    lora_a, lora_b, biases = contiguous(lora_a), contiguous(lora_b), contiguous(biases)
    packed, packed_dx = contiguous(packed), contiguous(packed_dx)
    layers = structs(
        layer(w.shape[0], y=y, weight=w, bias=b, packed=forward, packed_dx=across)
        for y, w, b, forward, across in zip(
            ys, weights, biases, or_nones(packed, count), or_nones(packed_dx, count), strict=True
        )
    )
    adapters = structs(
        adapter(a, b, s, p_j, 0, m, xa=xa)
        for a, b, s, p_j, xa in zip(lora_a, lora_b, scaling, p, xas, strict=True)
    )
    try:
        _native.cpu().lora_projections(
            layers=address_of(layers),
            adapters=address_of(adapters),
            x=x.data_ptr(),
            rng=address(rng),
            count=count,
            m=m,
            k=k,
            x_stride_m=x.stride(0),
            x_stride_k=x.stride(1),
            dtype=DTYPES[x.dtype],
            adapter_dtype=DTYPES[lora_a[0].dtype],
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_packed("lora_projections", error, (*packed, *packed_dx))


def _backward_unsupported(grads: _Tensors, *_: Any) -> str | None:
    if len(grads) > _MOST:
        return f"{len(grads)} projections are more than {_MOST}"
    return cpu_unsupported(grads)


@implement("lora_projections_backward", "cpu", unsupported=_backward_unsupported)
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
    count, k = len(weights), weights[0].shape[1]
    m = grads[0].shape[:-1].numel()
    grads = [rows(grad, m, w.shape[0]) for grad, w in zip(grads, weights, strict=True)]
    x = None if x is None else rows(x, m, k)
    rng = optional(rng)
    lora_a, lora_b, xas = contiguous(lora_a), contiguous(lora_b), contiguous(xas)
    packed, packed_dx = contiguous(packed), contiguous(packed_dx)
    # An output that is not needed has no elements: its address is null, and it is not computed.
    layers = structs(
        layer(w.shape[0], dweight=dw, dbias=db, grad=grad, weight=w, packed=forward, packed_dx=own)
        for w, dw, db, grad, forward, own in zip(
            weights,
            dweights,
            dbiases,
            grads,
            or_nones(packed, count),
            or_nones(packed_dx, count),
            strict=True,
        )
    )
    adapters = structs(
        adapter(a, b, s, p_j, 0, m, xa=xa, dlora_a=da, dlora_b=db, dscaling=ds)
        for a, b, s, p_j, xa, da, db, ds in zip(
            lora_a,
            lora_b,
            scaling,
            p,
            or_nones(xas, count),
            dlora_a,
            dlora_b,
            dscaling,
            strict=True,
        )
    )
    x_stride_m, x_stride_k = (0, 0) if x is None else x.stride()
    try:
        _native.cpu().lora_projections_backward(
            dx=dx.data_ptr(),
            layers=address_of(layers),
            adapters=address_of(adapters),
            x=address(x),
            rng=address(rng),
            count=count,
            m=m,
            k=k,
            x_stride_m=x_stride_m,
            x_stride_k=x_stride_k,
            dtype=DTYPES[grads[0].dtype],
            adapter_dtype=DTYPES[lora_a[0].dtype],
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_packed("lora_projections_backward", error, (*packed, *packed_dx))
