"""What the adapters of the family share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from pyfastft import _native
from pyfastft._check import name_of, reject
from pyfastft._native import DTYPES
from pyfastft.native.lora import linear


def cpu_unsupported(first: Any, *_: Any) -> str | None:
    """Why the CPU library cannot run an op whose first argument, or a tensor of its first list,
    has a dtype."""
    for one in first if isinstance(first, list | tuple) else (first,):
        if one.dtype not in DTYPES:
            return f"{name_of(one.dtype)} is not one of {', '.join(map(name_of, DTYPES))}"
    return _native.why_no_cpu()


def cuda_unsupported(several: Sequence[torch.Tensor], *_: Any) -> str | None:
    """Why the CUDA library cannot run an op whose first argument is this list."""
    return next(filter(None, map(linear.cuda_unsupported, several)), None)


def refuse_index(op: str, error: RuntimeError, argument: str = "index") -> NoReturn:
    """The ValueError for offsets that only the library has read; any other failing status is a
    bug, and raised as it is."""
    message = str(error).partition(": ")[2]
    if message.startswith(("index", argument)):
        reject(op, argument, "ascending offsets on the grid of its rectangles", message)
    raise error


def sizes(index: torch.Tensor, rows: int, columns: int) -> dict[str, int]:
    """The rectangles' part of the C arguments."""
    return {
        "count": index.shape[0],
        "rows": rows,
        "columns": columns,
        "index_bytes": index.element_size(),
    }
