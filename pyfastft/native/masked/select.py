"""select_topk on the native libraries."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.masked._rectangles import cpu_unsupported, cuda_unsupported, refuse_index
from pyfastft.ops.masked._rectangles import expect_index, matrix_of
from pyfastft.ops.masked.select import SCORES

# The fields of ft_masked_scored in csrc/include/fastft/api.h, in their order.
SCORED = ("a", "b", "exclude", "size", "columns", "excluded", "exclude_bytes", "dtype")
# 64-bit words of a row of the CUDA library's starts.
_START = 2


def _scored(
    tensors: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    exclude: Sequence[torch.Tensor],
) -> array[int]:
    structs = array("q")
    for i, tensor in enumerate(tensors):
        excluded = exclude[i] if exclude else None
        structs.extend(
            (
                tensor.data_ptr(),
                address(others[i] if others else None),
                address(excluded),
                tensor.numel(),
                max(matrix_of(tensor)[1], 1) if tensor.dim() else 1,
                0 if excluded is None else excluded.shape[0],
                8 if excluded is None else excluded.element_size(),
                DTYPES[tensor.dtype],
            )
        )
    return structs


@implement("select_topk", "cpu", unsupported=cpu_unsupported)
def select_topk(
    index: torch.Tensor,
    counts: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    exclude: Sequence[torch.Tensor],
    k: int,
    score: str,
    largest: bool,
    rng: torch.Tensor | None,
) -> None:
    held = [[one.contiguous() for one in several] for several in (tensors, others, exclude)]
    structs = _scored(*held)
    rng = None if rng is None else rng.contiguous()
    try:
        _native.cpu().select_topk(
            index=index.data_ptr(),
            counts=counts.data_ptr(),
            tensors=structs.buffer_info()[0],
            rng=address(rng),
            count=len(tensors),
            k=k,
            score=SCORES.index(score),
            largest=largest,
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_index("select_topk", error, "exclude")


@implement("select_topk", "cuda", unsupported=cuda_unsupported)
def _select_topk_on_a_gpu(
    index: torch.Tensor,
    counts: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    exclude: Sequence[torch.Tensor],
    k: int,
    score: str,
    largest: bool,
    rng: torch.Tensor | None,
) -> None:
    for tensor, offsets in zip(tensors, exclude, strict=False):
        expect_index("select_topk", offsets, 1, 1, 1, tensor.numel(), "exclude")
    if k == 0:
        counts.zero_()
        return
    held = [[one.contiguous() for one in several] for several in (tensors, others, exclude)]
    device, count = tensors[0].device, len(tensors)
    rng = None if rng is None else rng.to(device).contiguous()
    structs = _scored(*held)
    # One table of tensors, starts and the workspace's size, so that one copy brings it to the
    # device.
    at_starts = len(structs) * structs.itemsize
    structs.extend([0] * (_START * (count + 1) + 1))
    library = _native.cuda()
    first = structs.buffer_info()[0]
    at_words = (len(structs) - 1) * structs.itemsize
    library.select_topk_plan(
        starts=first + at_starts, words=first + at_words, tensors=first, count=count
    )
    words, blocks = structs[-1], structs[-1 - _START]
    with torch.cuda.device_of(tensors[0]):
        table = torch.frombuffer(structs, dtype=torch.int64).to(device)
        workspace = torch.zeros(words, dtype=torch.int64, device=device)
        library.select_topk(
            index=index.data_ptr(),
            counts=counts.data_ptr(),
            workspace=workspace.data_ptr(),
            tensors=table.data_ptr(),
            starts=table.data_ptr() + at_starts,
            rng=address(rng),
            words=words,
            count=count,
            blocks=blocks,
            k=k,
            score=SCORES.index(score),
            largest=largest,
            stream=_native.stream(device),
        )
