"""One optimizer step on the trained parts of several weights, in one launch.

``hypers`` has one row of seven float64 numbers for each weight:

    lr, weight_decay, the step's number from 1 on, the gradient's sign, and
    AdamW  beta1, beta2, eps
    SGD    momentum, dampening, whether Nesterov's (0 or 1)
    Lion   beta1, beta2, 0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._op import define
from pyfastft.ops.masked._rectangles import expect_rectangles, expect_weight, matrix_of, wide

HYPERS = 7
_RECTANGLES = "Tensor[] grads, Tensor[] index, SymInt[] rows, SymInt[] columns"


def _expect_step(
    op: str,
    weights: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    states: dict[str, Sequence[torch.Tensor]],
    grads: Sequence[torch.Tensor],
    index: Sequence[torch.Tensor],
    rows: Sequence[int],
    columns: Sequence[int],
    hypers: torch.Tensor,
    rng: torch.Tensor | None,
    optional: str = "",
) -> None:
    if not weights:
        reject(op, "weights", "at least one tensor", "none")
    device = weights[0].device
    vectors = {"values": values, **states, "grads": grads}
    for arg, several in {**vectors, "index": index, "rows": rows, "columns": columns}.items():
        if len(several) != len(weights):
            reject(op, arg, f"{len(weights)} of them", len(several), because="to match weights")
    for i, weight in enumerate(weights):
        expect_weight(op, f"weights[{i}]", weight, device)
        expect_dense(op, device, **{f"index[{i}]": index[i]})
        count = expect_rectangles(
            op, f"index[{i}]", index[i], rows[i], columns[i], *matrix_of(weight)
        )
        dtype, shape = wide(weight.dtype), (count,)
        for arg, several in vectors.items():
            tensor = several[i]
            # Of a model with some hundred weights the checks' calls would take the most of a step.
            if (
                tensor.shape == shape
                and tensor.dtype is dtype
                and tensor.device == device
                and tensor.layout is torch.strided
                and (arg == "grads" or tensor.is_contiguous())
            ):
                continue
            name = f"{arg}[{i}]"
            expect_dense(op, device, **{name: tensor})
            if tensor.numel() == 0 and arg in ("values", optional):
                continue
            expect_dtype(op, name, tensor, (dtype,), "beside weights")
            expect_shape(op, name, tensor, shape, "to match the rectangles")
            reject(op, name, "a contiguous layout", f"strides {tensor.stride()}")
    expect_dense(op, None, hypers=hypers)
    expect_shape(op, "hypers", hypers, (len(weights), HYPERS))
    expect_dtype(op, "hypers", hypers, (torch.float64,))
    if rng is not None:
        expect_dense(op, None, rng=rng)
        expect_shape(op, "rng", rng, (2,))
        expect_dtype(op, "rng", rng, (torch.int64,))


@define(
    "(Tensor(a!)[] weights, Tensor(b!)[] values, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    f"{_RECTANGLES}, Tensor hypers, Tensor? rng) -> ()"
)
def masked_adamw_(
    weights: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    index: Sequence[torch.Tensor],
    rows: Sequence[int],
    columns: Sequence[int],
    hypers: torch.Tensor,
    rng: torch.Tensor | None = None,
) -> None:
    """AdamW at the rectangles of each weight; nothing else of it is touched.

    weights: C-contiguous. values: the masters, float32 (float64 beside float64), or of no elements
    where the weight itself holds them. exp_avgs, exp_avg_sqs, grads: as values. rng: int64 (seed,
    offset), weights of half precision are then rounded stochastically.
    """
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _expect_step("masked_adamw_", weights, values, states, grads, index, rows, columns, hypers, rng)


@define(
    "(Tensor(a!)[] weights, Tensor(b!)[] values, Tensor(c!)[] momentum_buffers, "
    f"{_RECTANGLES}, Tensor hypers, Tensor? rng) -> ()"
)
def masked_sgd_(
    weights: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    index: Sequence[torch.Tensor],
    rows: Sequence[int],
    columns: Sequence[int],
    hypers: torch.Tensor,
    rng: torch.Tensor | None = None,
) -> None:
    """SGD at the rectangles of each weight; as :func:`masked_adamw_`.

    momentum_buffers: as values, or of no elements where there is no momentum.
    """
    states = {"momentum_buffers": momentum_buffers}
    _expect_step(
        *("masked_sgd_", weights, values, states, grads, index, rows, columns, hypers, rng),
        optional="momentum_buffers",
    )


@define(
    "(Tensor(a!)[] weights, Tensor(b!)[] values, Tensor(c!)[] exp_avgs, "
    f"{_RECTANGLES}, Tensor hypers, Tensor? rng) -> ()"
)
def masked_lion_(
    weights: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    index: Sequence[torch.Tensor],
    rows: Sequence[int],
    columns: Sequence[int],
    hypers: torch.Tensor,
    rng: torch.Tensor | None = None,
) -> None:
    """Lion at the rectangles of each weight; as :func:`masked_adamw_`."""
    states = {"exp_avgs": exp_avgs}
    _expect_step("masked_lion_", weights, values, states, grads, index, rows, columns, hypers, rng)
