"""select_topk on the CPU library."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from pyfastft import _native
from pyfastft._native import DTYPES, address
from pyfastft._op import implement
from pyfastft.native.masked._rectangles import cpu_unsupported, refuse_index
from pyfastft.ops.masked._rectangles import matrix_of
from pyfastft.ops.masked.select import SCORES

# The fields of ft_masked_scored in csrc/include/fastft/api.h, in their order.
SCORED = ("a", "b", "exclude", "size", "columns", "excluded", "exclude_bytes", "dtype")


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
    first, second, left_out = held
    structs = array("q")
    for i, tensor in enumerate(first):
        excluded = left_out[i] if left_out else None
        structs.extend(
            (
                tensor.data_ptr(),
                address(second[i] if second else None),
                address(excluded),
                tensor.numel(),
                max(matrix_of(tensor)[1], 1) if tensor.dim() else 1,
                0 if excluded is None else excluded.shape[0],
                8 if excluded is None else excluded.element_size(),
                DTYPES[tensor.dtype],
            )
        )
    rng = None if rng is None else rng.contiguous()
    try:
        _native.cpu().select_topk(
            index=index.data_ptr(),
            counts=counts.data_ptr(),
            tensors=structs.buffer_info()[0],
            rng=address(rng),
            count=len(first),
            k=k,
            score=SCORES.index(score),
            largest=largest,
            threads=torch.get_num_threads(),
        )
    except RuntimeError as error:
        refuse_index("select_topk", error, "exclude")
