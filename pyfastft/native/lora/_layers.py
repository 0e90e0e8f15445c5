"""What the adapters of the family share: the structs of the C ABI, and how they fail."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pyfastft import _native
from pyfastft._check import name_of, reject
from pyfastft._native import DTYPES, address
from pyfastft._random import dropout_threshold

# The fields of ft_lora_layer and ft_lora_adapter in csrc/include/fastft/api.h, in their order.
LAYER = (
    *("y", "dweight", "dbias", "grad", "weight", "bias", "packed", "packed_dx"),
    *("n", "grad_stride_m", "grad_stride_n", "weight_stride_n", "weight_stride_k"),
    *("packed_bytes", "packed_dx_bytes"),
)
ADAPTER = (
    *("xa", "dlora_a", "dlora_b", "dgate", "dscaling", "lora_a", "lora_b", "gate", "scaling"),
    *("r", "first_row", "rows", "gate_stride_m", "threshold"),
)


def cpu_unsupported(first: Any, *_: Any) -> str | None:
    """Why the CPU library cannot run an op whose first argument, or the first tensor of its first
    list, has the base's dtype."""
    if isinstance(first, list | tuple):
        first = first[0]
    if first.dtype not in DTYPES:
        return f"{name_of(first.dtype)} is not one of {', '.join(map(name_of, DTYPES))}"
    return _native.why_no_cpu()


def contiguous(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors as C-contiguous ones, to be held in a name until the kernel has returned."""
    return [tensor.contiguous() for tensor in tensors]


def optional(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as a C-contiguous one, or None."""
    return None if tensor is None else tensor.contiguous()


def rows(tensor: torch.Tensor, m: int, columns: int) -> torch.Tensor:
    """The tensor as a matrix; a copy only where its strides demand one."""
    return tensor if tensor.dim() == 2 else tensor.reshape(m, columns)


def layer(
    n: int,
    *,
    y: torch.Tensor | None = None,
    dweight: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    packed_dx: torch.Tensor | None = None,
) -> tuple[int, ...]:
    """One ft_lora_layer. ``grad`` is a matrix; ``bias`` and the packed weights are contiguous."""
    return (
        *map(address, (y, dweight, dbias, grad, weight, bias, packed, packed_dx)),
        n,
        *((0, 0) if grad is None else grad.stride()),
        *((0, 0) if weight is None else weight.stride()),
        0 if packed is None else packed.numel(),
        0 if packed_dx is None else packed_dx.numel(),
    )


def adapter(
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    p: float,
    first_row: int,
    length: int,
    *,
    xa: torch.Tensor | None,
    dlora_a: torch.Tensor | None = None,
    dlora_b: torch.Tensor | None = None,
    dscaling: torch.Tensor | None = None,
) -> tuple[int, ...]:
    """One ft_lora_adapter without a gate; all tensors are contiguous."""
    return (
        *map(address, (xa, dlora_a, dlora_b, None, dscaling, lora_a, lora_b, None, scaling)),
        *(lora_a.shape[0], first_row, length, 0, dropout_threshold(p)),
    )


def structs(fields: Iterable[tuple[int, ...]]) -> array[int]:
    """An array of structs, to be held in a name until the kernel has returned."""
    return array("q", [value for one in fields for value in one])


def address_of(memory: array[int]) -> int:
    """Where an array of structs begins."""
    return memory.buffer_info()[0]


def or_nones(tensors: Sequence[torch.Tensor], count: int) -> Sequence[torch.Tensor | None]:
    """A list that may be empty, as one of that length."""
    return tensors or [None] * count


def refuse_packed(op: str, error: RuntimeError, packed: Iterable[torch.Tensor | None]) -> None:
    """The ValueError for a packed weight that is not the one expected, which only the library can
    tell; any other failing status is a bug, and raised as it is."""
    message = str(error)
    if any(one is not None for one in packed) and "packed" in message:
        got = message.partition(": ")[2] or message
        reject(op, "packed", "this weight, as pack_weight gives it here", got)
    raise error
