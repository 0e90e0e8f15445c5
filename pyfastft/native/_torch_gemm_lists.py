"""lora_projections and lora_adapters as torch's GEMM with the stages of lora_linear around it.

What :mod:`pyfastft.native._torch_gemm` is to one layer and one adapter, this is to several; the
CUDA and Triton backends supply the same stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pyfastft._random import dropout_threshold
from pyfastft.native._torch_gemm import Stages, matrix_rows
from pyfastft.ops.lora.adapters import PER_ADAPTER
from pyfastft.ops.lora.projections import PER_PROJECTION

_Tensors = Sequence[torch.Tensor]

# Up to so many products are added up in an output of half precision, each rounding the sum so far:
# 1 + ... + P roundings' variance, no more than the 2 P of rounding products and sums apart, as the
# unfused expression does. More go as one product over all columns, whose operands are copied.
_MOST_IN_PLACE = 3


class Masks:
    """With what each of P adapters drops: its threshold of 65536, and its row (seed + j, offset) of
    ``streams`` (P, 2), which is there where anything is dropped.
    """

    def __init__(self, p: Sequence[float], rng: torch.Tensor | None) -> None:
        self.thresholds = [dropout_threshold(one) if rng is not None else 0 for one in p]
        self.streams: torch.Tensor | None = None
        if rng is not None and any(self.thresholds):
            # On the device throughout: a number brought from the host would break a CUDA graph.
            seeds = rng[0] + torch.arange(len(p), device=rng.device)
            self.streams = torch.stack((seeds, rng[1].expand_as(seeds)), dim=1)

    def stream(self, j: int) -> torch.Tensor | None:
        """What adapter j draws with."""
        return None if self.streams is None else self.streams[j]


class SeveralStages(Stages, Protocol):
    """The stages of lora_linear, and one for several adapters at once."""

    def dx_of_all(
        self,
        *,
        dx: torch.Tensor,
        ts: _Tensors,
        lora_a: _Tensors,
        scaling: _Tensors,
        masks: Masks,
    ) -> None:
        """dx += sum_j s_j dropout_j(t_j A_j); one by one where a backend has nothing better."""
        for j, (t, a, s) in enumerate(zip(ts, lora_a, scaling, strict=True)):
            _dx(self, dx, t, a, s, masks, j)


def _base(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """y = x W^T + b."""
    if bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)


def _down(
    stages: Stages, xa: torch.Tensor, x: torch.Tensor, lora_a: torch.Tensor, masks: Masks, j: int
) -> None:
    """xa = dropout_j(x) A^T, of any sizes."""
    if x.shape[1] == 0:
        xa.zero_()
    elif x.shape[0] > 0:
        lora_a = lora_a.contiguous()
        stages.down(xa=xa, x=x, lora_a=lora_a, rng=masks.stream(j), threshold=masks.thresholds[j])


def _up(
    stages: Stages, y: torch.Tensor, xa: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> None:
    """y += s xa B^T, of any sizes."""
    if y.numel() > 0:
        stages.up(y=y, xa=xa, lora_b=lora_b.contiguous(), scaling=scaling)


def _up_grad(
    stages: Stages,
    dlora_b: torch.Tensor | None,
    dscaling: torch.Tensor | None,
    grad: torch.Tensor,
    xa: torch.Tensor | None,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
) -> torch.Tensor:
    """t = grad B, beside it dB and ds where they are not None; of any sizes."""
    m, r = grad.shape[0], lora_b.shape[1]
    t = grad.new_empty((m, r), dtype=torch.float32)
    if grad.numel() == 0:
        for output in (t, dlora_b, dscaling):
            if output is not None:
                output.zero_()
        return t
    stages.up_grad(
        t=t,
        dlora_b=dlora_b,
        dscaling=dscaling,
        grad=grad,
        xa=None if xa is None else xa.reshape(m, r).contiguous(),
        lora_b=lora_b.contiguous(),
        scaling=scaling,
    )
    return t


def _down_grad(
    stages: Stages,
    dlora_a: torch.Tensor,
    t: torch.Tensor,
    x: torch.Tensor,
    scaling: torch.Tensor,
    masks: Masks,
    j: int,
) -> None:
    """dA = s t^T dropout_j(x), of any sizes."""
    if x.numel() == 0:
        dlora_a.zero_()
        return
    stages.down_grad(
        dlora_a=dlora_a,
        t=t,
        x=x,
        scaling=scaling,
        rng=masks.stream(j),
        threshold=masks.thresholds[j],
    )


def _dx(
    stages: Stages,
    dx: torch.Tensor,
    t: torch.Tensor,
    lora_a: torch.Tensor,
    scaling: torch.Tensor,
    masks: Masks,
    j: int,
) -> None:
    """dx += s dropout_j(t A), of any sizes."""
    if dx.numel() > 0:
        stages.dx(
            dx=dx,
            t=t,
            lora_a=lora_a.contiguous(),
            scaling=scaling,
            rng=masks.stream(j),
            threshold=masks.thresholds[j],
        )


def projections_forward(
    stages: Stages,
    ys: _Tensors,
    xas: _Tensors,
    x: torch.Tensor,
    weights: _Tensors,
    lora_a: _Tensors,
    lora_b: _Tensors,
    biases: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    rng: torch.Tensor | None,
    packed: _Tensors,
    packed_dx: _Tensors,
) -> None:
    """lora_projections. x is read once for all xa_j where nothing is dropped."""
    k = weights[0].shape[1]
    x = matrix_rows(x, k)
    m = x.shape[0]
    ys = [y.view(m, b.shape[0]) for y, b in zip(ys, lora_b, strict=True)]
    xas = [xa.view(m, a.shape[0]) for xa, a in zip(xas, lora_a, strict=True)]
    masks = Masks(p, rng)

    for y, weight, bias in zip(ys, weights, biases, strict=True):
        _base(y, x, weight, bias if bias.numel() else None)
    ranks = [a.shape[0] for a in lora_a]
    # One pass leaves the xa_j side by side, to be copied apart: 2 R elements of a row against the
    # K of each pass that is spared.
    if masks.streams is None and 2 * sum(ranks) < k * (len(ranks) - 1):
        beside = x.new_empty((m, sum(ranks)), dtype=lora_a[0].dtype)
        _down(stages, beside, x, torch.cat(list(lora_a)), masks, 0)
        for xa, part in zip(xas, beside.split(ranks, dim=1), strict=True):
            xa.copy_(part)
    else:
        for j, (xa, a) in enumerate(zip(xas, lora_a, strict=True)):
            _down(stages, xa, x, a, masks, j)
    for y, xa, b, s in zip(ys, xas, lora_b, scaling, strict=True):
        _up(stages, y, xa, b, s)


def projections_backward(
    stages: SeveralStages,
    dx: torch.Tensor,
    dweights: _Tensors,
    dlora_a: _Tensors,
    dlora_b: _Tensors,
    dbiases: _Tensors,
    dscaling: _Tensors,
    grads: _Tensors,
    x: torch.Tensor | None,
    weights: _Tensors,
    lora_a: _Tensors,
    lora_b: _Tensors,
    xas: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    rng: torch.Tensor | None,
    packed: _Tensors,
    packed_dx: _Tensors,
    need: Sequence[bool],
) -> None:
    """lora_projections_backward; dx is the sum over projections. Where nothing is dropped there is
    one low-rank update of dx for all of them, and one pass over x for all dA_j.
    """
    count, k = len(weights), weights[0].shape[1]
    need_x = need[0]
    needs = [need[1 + PER_PROJECTION * j :][:PER_PROJECTION] for j in range(count)]
    grads = [matrix_rows(g, w.shape[0]) for g, w in zip(grads, weights, strict=True)]
    m = grads[0].shape[0]
    x = None if x is None else matrix_rows(x, k)
    masks = Masks(p, rng)

    if need_x:
        dx = dx.view(m, k)
        _sum_of_products(dx, grads, weights)
    for j, (need_weight, _, _, need_bias, _) in enumerate(needs):
        if need_weight:
            assert x is not None
            torch.mm(grads[j].T, x, out=dweights[j])
        if need_bias:
            torch.sum(grads[j], dim=0, out=dbiases[j])

    ts: dict[int, torch.Tensor] = {}
    for j, (_, need_a, need_b, _, need_scaling) in enumerate(needs):
        if need_x or need_a or need_b or need_scaling:
            ts[j] = _up_grad(
                stages,
                dlora_b[j] if need_b else None,
                dscaling[j] if need_scaling else None,
                grads[j],
                xas[j] if xas else None,
                lora_b[j],
                scaling[j],
            )
    wanted = [j for j, flags in enumerate(needs) if flags[1]]
    if masks.streams is not None or count == 1:
        for j in wanted:
            assert x is not None
            _down_grad(stages, dlora_a[j], ts[j], x, scaling[j], masks, j)
        if need_x and dx.numel() > 0:
            values = list(ts.values())
            stages.dx_of_all(dx=dx, ts=values, lora_a=lora_a, scaling=scaling, masks=masks)
        return
    # Side by side the adapters are one of rank R_1 + R_2 + ..., s_j already in t_j.
    one = torch.ones_like(scaling[0])
    if wanted:
        assert x is not None
        beside = torch.cat([ts[j] * scaling[j] for j in wanted], dim=1)
        gradient = lora_a[0].new_empty((beside.shape[1], k))
        _down_grad(stages, gradient, beside, x, one, masks, 0)
        ranks = [lora_a[j].shape[0] for j in wanted]
        for j, part in zip(wanted, gradient.split(ranks), strict=True):
            dlora_a[j].copy_(part)
    if need_x:
        beside = torch.cat([ts[j] * scaling[j] for j in range(count)], dim=1)
        _dx(stages, dx, beside, torch.cat(list(lora_a)), one, masks, 0)


def _sum_of_products(out: torch.Tensor, grads: _Tensors, weights: _Tensors) -> None:
    """out = sum_j grad_j W_j."""
    if out.dtype is not torch.float32 and len(grads) > _MOST_IN_PLACE:
        torch.mm(torch.cat(list(grads), dim=1), torch.cat(list(weights)), out=out)
        return
    torch.mm(grads[0], weights[0], out=out)
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        out.addmm_(grad, weight)


def adapters_forward(
    stages: Stages,
    y: torch.Tensor,
    xas: _Tensors,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: _Tensors,
    lora_b: _Tensors,
    bias: torch.Tensor | None,
    scaling: _Tensors,
    p: Sequence[float],
    lengths: Sequence[int],
    rng: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
) -> None:
    """lora_adapters: one base product for all rows, the stages on the rows of each adapter."""
    x = matrix_rows(x, weight.shape[1])
    masks = Masks(p, rng)
    _base(y, x, weight, bias)
    for j, rows in enumerate(_segments(lengths)):
        _down(stages, xas[j], x[rows], lora_a[j], masks, j)
        _up(stages, y[rows], xas[j], lora_b[j], scaling[j])


def adapters_backward(
    stages: Stages,
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dlora_a: _Tensors,
    dlora_b: _Tensors,
    dbias: torch.Tensor,
    dscaling: _Tensors,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_a: _Tensors,
    lora_b: _Tensors,
    xas: _Tensors,
    scaling: _Tensors,
    p: Sequence[float],
    lengths: Sequence[int],
    rng: torch.Tensor | None,
    packed: torch.Tensor | None,
    packed_dx: torch.Tensor | None,
    need: Sequence[bool],
) -> None:
    """lora_adapters_backward: dx, dW and db over all rows, the rest on the rows of each adapter."""
    n, k = weight.shape
    need_x, need_weight, need_bias = need[:3]
    grad = matrix_rows(grad, n)
    x = None if x is None else matrix_rows(x, k)
    masks = Masks(p, rng)

    if need_x:
        torch.mm(grad, weight, out=dx)
    if need_weight:
        assert x is not None
        torch.mm(grad.T, x, out=dweight)
    if need_bias:
        torch.sum(grad, dim=0, out=dbias)
    for j, rows in enumerate(_segments(lengths)):
        need_a, need_b, need_scaling = need[3 + PER_ADAPTER * j :][:PER_ADAPTER]
        if not (need_x or need_a or need_b or need_scaling):
            continue
        t = _up_grad(
            stages,
            dlora_b[j] if need_b else None,
            dscaling[j] if need_scaling else None,
            grad[rows],
            xas[j] if xas else None,
            lora_b[j],
            scaling[j],
        )
        if need_a:
            assert x is not None
            _down_grad(stages, dlora_a[j], t, x[rows], scaling[j], masks, j)
        if need_x:
            _dx(stages, dx[rows], t, lora_a[j], scaling[j], masks, j)


def _segments(lengths: Sequence[int]) -> list[slice]:
    """The rows of each adapter."""
    segments, begin = [], 0
    for length in lengths:
        segments.append(slice(begin, begin + length))
        begin += length
    return segments
