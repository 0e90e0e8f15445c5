"""What the adapters of the family share: a 4-bit weight as C arguments, and how they fail."""

from __future__ import annotations

from typing import NoReturn

import torch

from pyfastft import _native
from pyfastft._check import name_of, reject
from pyfastft._codebook import CODEBOOKS
from pyfastft._native import DTYPES

# Mirrors ft_zero of csrc/include/fastft/codebook.h.
_NO_ZERO, _UINT8_ZERO, _FLOAT_ZERO = range(3)


def cpu_unsupported(
    lead: torch.Tensor, scale: torch.Tensor, packed: torch.Tensor | None = None
) -> str | None:
    """Why the CPU library cannot run an op whose dtypes are those of ``lead`` and ``scale``."""
    for tensor in (lead, scale):
        if tensor.dtype not in DTYPES:
            return f"{name_of(tensor.dtype)} is not one of {', '.join(map(name_of, DTYPES))}"
    if packed is not None:
        return "the codes are packed for another backend"
    return _native.why_no_cpu()


def codebook_code(codebook: str) -> int:
    """Mirrors ft_codebook of csrc/include/fastft/codebook.h."""
    return CODEBOOKS.index(codebook)


def zero_kind(zero: torch.Tensor | None) -> int:
    """What the zero-points are, as the library counts it."""
    if zero is None:
        return _NO_ZERO
    return _FLOAT_ZERO if zero.is_floating_point() else _UINT8_ZERO


def refuse_perm(op: str, error: RuntimeError, perm: torch.Tensor | None) -> NoReturn:
    """The ValueError for a perm that is no permutation, which only the library looks into; any
    other failing status is a bug, and raised as it is."""
    message = str(error)
    if perm is not None and "perm" in message:
        reject(op, "perm", "a permutation of the features", message.partition(": ")[2] or message)
    raise error
