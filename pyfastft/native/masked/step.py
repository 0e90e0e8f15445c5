"""The masked optimizer steps on the native libraries: all weights in one call."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.masked._rectangles import cpu_unsupported, cuda_unsupported, refuse_index
from pyfastft.ops.masked._rectangles import expect_index, matrix_of

# The fields of ft_masked_segment in csrc/include/fastft/api.h, in their order.
SEGMENT = (
    *("weight", "value", "first", "second", "grad", "index"),
    *("count", "rows", "columns", "stride", "size", "dtype", "index_bytes"),
)
METHODS = ("masked_adamw_", "masked_sgd_", "masked_lion_")
# 64-bit words of a segment in the CUDA library's plan: its two starts, and FT_STEP_FACTORS floats.
_START, _FACTORS = 2, 4


def _segments(
    weights: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    states: Sequence[Sequence[torch.Tensor]],
    grads: Sequence[torch.Tensor],
    index: Sequence[torch.Tensor],
    rows: Sequence[int],
    columns: Sequence[int],
) -> array[int]:
    structs = array("q")
    for i, weight in enumerate(weights):
        structs.extend(
            (
                weight.data_ptr(),
                values[i].data_ptr(),
                *(several[i].data_ptr() for several in states),
                *(0 for _ in range(2 - len(states))),
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
    return structs


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
        structs = _segments(weights, values, own, grads, index, rows, columns)
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


def _cuda_launcher(op: str, states: int) -> Callable[..., None]:
    def launch(
        weights: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *rest: Any,
    ) -> None:
        own, (grads, index, rows, columns, hypers, rng) = rest[:states], rest[states:]
        for i, weight in enumerate(weights):
            expect_index(op, index[i], rows[i], columns[i], *matrix_of(weight))
        grads = [one.contiguous() for one in grads]
        index = [one.contiguous() for one in index]
        hypers = hypers.to("cpu").contiguous()
        device, count, method = weights[0].device, len(weights), METHODS.index(op)
        rng = None if rng is None else rng.to(device).contiguous()
        structs = _segments(weights, values, own, grads, index, rows, columns)
        # One table of segments, starts and factors, so that one copy brings it to the device.
        starts = len(structs)
        factors = starts + _START * (count + 1)
        structs.extend([0] * (_START * (count + 1) + _FACTORS * count))
        at_starts, at_factors = starts * structs.itemsize, factors * structs.itemsize
        library = _native.cuda()
        first = structs.buffer_info()[0]
        library.masked_step_plan(
            starts=first + at_starts,
            factors=first + at_factors,
            segments=first,
            hypers=hypers.data_ptr(),
            count=count,
            method=method,
        )
        with torch.cuda.device_of(weights[0]):
            table = torch.frombuffer(structs, dtype=torch.int64).to(device)
            library.masked_step(
                segments=table.data_ptr(),
                starts=table.data_ptr() + at_starts,
                factors=table.data_ptr() + at_factors,
                rng=address(rng),
                count=count,
                blocks=structs[factors - _START],
                method=method,
                stream=_native.stream(device),
            )

    return launch


for _op, _states in zip(METHODS, (2, 1, 1), strict=True):
    implement(_op, "cpu", unsupported=cpu_unsupported)(_launcher(_op, _states))
    implement(_op, "cuda", unsupported=cuda_unsupported)(_cuda_launcher(_op, _states))
