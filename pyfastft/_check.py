"""The wording and the exception type of every rejected argument.

``<op>: expected <arg> of <what> <because>, got <actual>``. Contracts call these; kernels assume.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NoReturn

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def reject(
    op: str,
    arg: str,
    what: str,
    got: object,
    *,
    because: str = "",
    error: type[Exception] = ValueError,
) -> NoReturn:
    """Raise the error for one argument: ``what`` was expected of ``arg``, ``got`` came."""
    reason = f" {because}" if because else ""
    raise error(f"{op}: expected {arg} of {what}{reason}, got {got}")


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def expect_dense(op: str, device: torch.device | None, **operands: object) -> None:
    """TypeError unless all are dense tensors, ValueError unless they are on ``device``."""
    for arg, value in operands.items():
        if not isinstance(value, torch.Tensor):
            reject(op, arg, "type Tensor", type(value).__name__, error=TypeError)
        if value.layout is not torch.strided:
            reject(op, arg, "a dense layout", value.layout, error=TypeError)
        if device is not None and value.device != device:
            because = "to match the first argument"
            reject(op, arg, f"device {device}", value.device, because=because)


def expect_dtype(
    op: str,
    arg: str,
    tensor: torch.Tensor,
    dtypes: Collection[torch.dtype],
    because: str = "",
) -> None:
    """TypeError unless the dtype is one of ``dtypes``."""
    if tensor.dtype not in dtypes:
        what = "dtype " + " or ".join(map(name_of, dtypes))
        reject(op, arg, what, name_of(tensor.dtype), because=because, error=TypeError)


def expect_shape(
    op: str,
    arg: str,
    tensor: torch.Tensor,
    shape: Sequence[int | str | None],
    because: str = "",
) -> None:
    """ValueError unless the shape is ``shape``, where a string names a size that may be any."""
    actual = tensor.shape
    if len(actual) == len(shape):
        for size, wanted in zip(actual, shape, strict=True):
            if not isinstance(wanted, str) and size != wanted:
                break
        else:
            return
    wanted_text = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
    reject(op, arg, f"shape ({wanted_text})", tuple(actual), because=because)
