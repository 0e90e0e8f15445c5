"""The masked optimizer steps on the CPU library: all weights in one call."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.masked._rectangles import cpu_unsupported, refuse_index
from pyfastft.ops.masked._rectangles import matrix_of

# The fields of ft_masked_segment in csrc/include/fastft/api.h, in their order.
SEGMENT = (
    *("weight", "value", "first", "second", "grad", "index"),
    *("count", "rows", "columns", "stride", "size", "dtype", "index_bytes"),
)
METHODS = ("masked_adamw_", "masked_sgd_", "masked_lion_")


def _launcher(op: str, states: int) -> Callable[..., None]:
    def launch(
        weights: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *rest: Any,
    ) -> None:
        own, (grads, index, rows, columns, hypers, rng) = rest[:states], rest[states:]
        grads = [one.contiguous() for one in grads]
        index = [one.contiguous() for one in index]
        hypers = hypers.to("cpu").contiguous()
        rng = None if rng is None else rng.to("cpu").contiguous()
        structs = array("q")
        for i, weight in enumerate(weights):
            structs.extend(
                (
                    weight.data_ptr(),
                    values[i].data_ptr(),
                    *(several[i].data_ptr() for several in own),
                    *(0 for _ in range(2 - states)),
                    grads[i].data_ptr(),
                    index[i].data_ptr(),
                    index[i].shape[0],
                    rows[i],
                    columns[i],
                    matrix_of(weight)[1],
                    weight.numel(),
                    DTYPES[weight.dtype],
                    index[i].element_size(),
                )
            )
        try:
            _native.cpu().masked_step(
                segments=structs.buffer_info()[0],
                hypers=hypers.data_ptr(),
                rng=address(rng),
                count=len(weights),
                method=METHODS.index(op),
                threads=torch.get_num_threads(),
            )
        except RuntimeError as error:
            refuse_index(op, error)

    return launch


for _op, _states in zip(METHODS, (2, 1, 1), strict=True):
    implement(_op, "cpu", unsupported=cpu_unsupported)(_launcher(_op, _states))
