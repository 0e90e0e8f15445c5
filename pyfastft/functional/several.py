"""Several adapted layers of one input, and several adapters on one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfastft import ops
from pyfastft._check import expect_dense, reject
from pyfastft.functional._arguments import as_scaling, for_each, rng_for

_Tensors = Sequence[torch.Tensor]


def lora_projections(
    x: torch.Tensor,
    weights: _Tensors,
    lora_a: _Tensors,
    lora_b: _Tensors,
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    scaling: float | torch.Tensor | Sequence[float | torch.Tensor] = 1.0,
    p: float | Sequence[float] = 0.0,
    rng: torch.Tensor | None = None,
    packed: _Tensors = (),
    packed_dx: _Tensors = (),
) -> list[torch.Tensor]:
    r"""Several linear layers of one input, each with its low-rank update, in one op.

    .. math:: y_j = x W_j^T + b_j + s_j \cdot \mathrm{dropout}_{p_j}(x) A_j^T B_j^T

    For q, k and v, or gate and up: x is read once for all of them, and dX is written once. Each
    projection drops by a mask of its own, as separate layers do.

    Args:
        x: input of shape (..., K); float32, bfloat16, float16 or float64, any strides.
        weights: W_j of shape (N_j, K), of x's dtype.
        lora_a: A_j of shape (R_j, K); all of x's dtype, or all float32 beside a half-precision
            base.
        lora_b: B_j of shape (N_j, R_j), of A's dtype.
        biases: b_j of shape (N_j,), of x's dtype; None where a projection, or none, has one.
        scaling: s_j, one for all or one each; tensors as in :func:`lora_linear`.
        p: dropout probabilities, one for all or one each.
        rng: int64 tensor (seed, offset), drawn from torch's generator where absent and needed.
            Projection j draws with seed + j, so it drops as ``lora_linear`` with that seed.
        packed: each W_j as ``pack_weight(weight)`` gives it, or nothing (CPU).
        packed_dx: the same of ``pack_weight(weight, transposed=True)``.

    Returns:
        y_j of shape (..., N_j), a list in the order of ``weights``.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`lora_linear`.

    Reference:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.
    """
    op, count = "lora_projections", len(weights)
    each = for_each(op, "p", p, count)
    return ops.lora_projections(
        x,
        list(weights),
        list(lora_a),
        list(lora_b),
        [x.new_empty(0) if b is None else b for b in for_each(op, "biases", biases, count)],
        [as_scaling(s, x) for s in for_each(op, "scaling", scaling, count)],
        each,
        rng_for(rng, each, x.device),
        list(packed),
        list(packed_dx),
    )[0]


def lora_adapters(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: _Tensors,
    lora_b: _Tensors,
    index: torch.Tensor | Sequence[int],
    *,
    bias: torch.Tensor | None = None,
    scaling: float | torch.Tensor | Sequence[float | torch.Tensor] = 1.0,
    p: float | Sequence[float] = 0.0,
    rng: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    packed_dx: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""One linear layer whose rows, or samples, each have an adapter of their own.

    .. math:: y_m = x_m W^T + b + s_{j} \cdot \mathrm{dropout}_{p_{j}}(x_m) A_{j}^T B_{j}^T,
        \quad j = \mathrm{index}_m

    For training and inference. The base product is one for all; rows are brought into the order of
    their adapters and back, which copies nothing where they stand in it already.

    Args:
        x: input of shape (..., K).
        weight: W of shape (N, K), of x's dtype.
        lora_a: A_j of shape (R_j, K) of every adapter, whose ranks may differ.
        lora_b: B_j of shape (N, R_j).
        index: the adapter's number of each row, or of each sample of the leading dimensions: its
            shape is that of the first of x's dimensions. -1 is the base alone. It is read by
            the host, so on a GPU it had better be there: a list, or a tensor on the CPU.
        bias: b of shape (N,), of x's dtype.
        scaling: s_j, one for all or one each; tensors as in :func:`lora_linear`.
        p: dropout probabilities, one for all or one each.
        rng: int64 tensor (seed, offset), drawn from torch's generator where absent and needed.
            Adapter j draws with seed + j, counting its own rows.
        packed: W as ``pack_weight(weight)`` gives it (CPU).
        packed_dx: the same of ``pack_weight(weight, transposed=True)``.

    Returns:
        y of shape (..., N), of x's dtype.

    Raises:
        ValueError: index does not fit x, or names an adapter that there is not.
        ValueError, TypeError, NotImplementedError: as :func:`lora_linear`.

    Reference:
        Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", section 3.
    """
    op, count = "lora_adapters", len(lora_a)
    numbers, rows = _numbers(op, x, index, count)
    order = None if bool((numbers[1:] >= numbers[:-1]).all()) else numbers.argsort(stable=True)
    lengths = torch.bincount(numbers, minlength=count + 1).mul_(rows)[:count].tolist()
    each = for_each(op, "p", p, count)
    leading, k, n = x.shape[:-1], x.shape[-1], weight.shape[0]
    if order is not None:
        x = _Permutation.apply(x.reshape(order.numel(), rows * k), order.to(x.device))
    y = ops.lora_adapters(
        x.reshape(leading.numel(), k),
        weight,
        list(lora_a),
        list(lora_b),
        bias,
        [as_scaling(s, x) for s in for_each(op, "scaling", scaling, count)],
        each,
        lengths,
        rng_for(rng, each, x.device),
        packed,
        packed_dx,
    )[0]
    if order is not None:
        back = _inverse(order).to(x.device)
        y = _Permutation.apply(y.reshape(order.numel(), rows * n), back)
    return y.reshape(*leading, n)


def _numbers(
    op: str, x: torch.Tensor, index: torch.Tensor | Sequence[int], count: int
) -> tuple[torch.Tensor, int]:
    """The samples' adapters, the base's last, as one vector; and how many rows a sample has."""
    expect_dense(op, None, x=x)
    if not isinstance(index, torch.Tensor):
        index = torch.tensor(index, dtype=torch.int64)
    if index.is_floating_point() or index.is_complex() or index.dtype is torch.bool:
        reject(op, "index", "integers", str(index.dtype), error=TypeError)
    leading = x.shape[:-1]
    if index.dim() < 1 or index.shape != leading[: index.dim()]:
        because = f"to match x of shape {tuple(x.shape)}"
        reject(op, "index", "one number per sample or row", tuple(index.shape), because=because)
    rows = leading[index.dim() :].numel()
    numbers = index.reshape(-1).long()
    if numbers.numel() and not (int(numbers.min()) >= -1 and int(numbers.max()) < count):
        got = f"{int(numbers.min())} to {int(numbers.max())}"
        reject(op, "index", f"numbers from -1 to {count - 1}", got)
    return torch.where(numbers < 0, count, numbers), rows


class _Permutation(torch.autograd.Function):
    """Rows in another order; the gradient gathers by the inverse, where indexing would scatter."""

    @staticmethod
    def forward(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (order,) = ctx.saved_tensors
        return _Permutation.apply(grad, _inverse(order)), None


def _inverse(order: torch.Tensor) -> torch.Tensor:
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return back
