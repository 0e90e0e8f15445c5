"""select_topk: the best entries of several tensors together, exactly, without a score tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft import _alloc
from pyfastft._check import FLOATS, expect_dense, expect_dtype, expect_shape, name_of, reject
from pyfastft._op import define
from pyfastft.ops.masked._rectangles import INDEX_DTYPES, matrix_of, wide

# By the numbers of the C ABI. What of ``others`` a score reads: nothing, a tensor of the same
# shape, or one number per column.
SCORES = (
    *("magnitude", "square", "value", "product", "movement", "difference", "wanda"),
    "random",
)
PAIRED = ("product", "movement", "difference")


@define(
    "(Tensor[] tensors, Tensor[] others, Tensor[] exclude, SymInt k, str score, bool largest,"
    " Tensor? rng) -> (Tensor index, Tensor counts)"
)
def select_topk(
    tensors: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    exclude: Sequence[torch.Tensor],
    k: int,
    score: str = "magnitude",
    largest: bool = True,
    rng: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k entries of the largest (or smallest) score; of equal scores the first, NaN last.

    tensors: one dtype each, any shapes and strides, counted in C order. others: one for each, or
    none where the score reads none. exclude: one ascending int32 or int64 list of flat offsets for
    each tensor, or none at all. Outputs index (k,), int64: ascending positions in all tensors, one
    after the other; counts (len(tensors),), int64: how many of them in each.
    """
    op = "select_topk"
    if not tensors:
        reject(op, "tensors", "at least one tensor", "none")
    if score not in SCORES:
        reject(op, "score", f"one of {', '.join(SCORES)}", repr(score))
    device = tensors[0].device
    total = 0
    for i, tensor in enumerate(tensors):
        expect_dense(op, device, **{f"tensors[{i}]": tensor})
        expect_dtype(op, f"tensors[{i}]", tensor, FLOATS)
        total += tensor.numel()
    reads = score in PAIRED or score == "wanda"
    if len(others) != (len(tensors) if reads else 0):
        what = f"{len(tensors)} tensors" if reads else "no tensors"
        reject(op, "others", what, len(others), because=f"for the score {score!r}")
    for i, (tensor, other) in enumerate(zip(tensors, others, strict=False)):
        arg = f"others[{i}]"
        expect_dense(op, device, **{arg: other})
        if score == "wanda":
            expect_shape(op, arg, other, (matrix_of(tensor)[1],), "one number per column")
            expect_dtype(op, arg, other, (wide(tensor.dtype),), f"beside {name_of(tensor.dtype)}")
        else:
            expect_shape(op, arg, other, tensor.shape, f"to match tensors[{i}]")
            expect_dtype(op, arg, other, (tensor.dtype,), f"to match tensors[{i}]")
    if exclude and len(exclude) != len(tensors):
        reject(op, "exclude", f"{len(tensors)} lists or none", len(exclude))
    for i, left_out in enumerate(exclude):
        expect_dense(op, device, **{f"exclude[{i}]": left_out})
        expect_dtype(op, f"exclude[{i}]", left_out, INDEX_DTYPES)
        expect_shape(op, f"exclude[{i}]", left_out, ("count",))
        total -= left_out.shape[0]
    if not 0 <= k <= total:
        reject(op, "k", f"0 to {total}, the entries to select from", k)
    if score == "random":
        if rng is None:
            reject(op, "rng", "type Tensor", "None", because="for a random score", error=TypeError)
        expect_dense(op, device, rng=rng)
        expect_shape(op, "rng", rng, (2,))
        expect_dtype(op, "rng", rng, (torch.int64,))
    first = tensors[0]
    return (
        _alloc.empty((k,), like=first, dtype=torch.int64),
        _alloc.empty((len(tensors),), like=first, dtype=torch.int64),
    )
