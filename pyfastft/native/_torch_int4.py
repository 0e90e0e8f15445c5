"""int4_linear on a GPU: W in panels for torch's GEMM, or an engine that reads the codes itself.

The engine that is proven, and runs where no measurement says otherwise, brings W out of its codes
in panels of bounded size and multiplies with torch's GEMM, which writes into the op's outputs. So
do the gradients: nothing as large as W is ever held. torch's settings (TF32, reduced-precision
reductions) apply to these products. ``triton_kernels/_int4_engine.py`` says which engine runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pyfastft._check import name_of
from pyfastft._codebook import TABLES
from pyfastft._native import DTYPES
from pyfastft.native._torch_gemm import Stages, device_name, matrix_rows
from pyfastft.native._torch_gemm import backward as lora_backward
from pyfastft.native._torch_gemm import forward as lora_forward
from pyfastft.triton_kernels import _int4_engine


@dataclass(frozen=True)
class Weight:
    """A 4-bit weight (N, K) as the kernels take it: everything contiguous, in the order of the
    codes; ``table`` 16 float32 on the device, or None for integers."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    table: torch.Tensor | None
    k: int
    group_size: int

    @property
    def n(self) -> int:
        """Rows: output features."""
        return self.codes.shape[0]

    def rows(self, first: int, count: int) -> Weight:
        """So many rows from one on."""
        part = slice(first, first + count)
        zero = None if self.zero is None else self.zero[part]
        sizes = (self.table, self.k, self.group_size)
        return Weight(self.codes[part], self.scale[part], zero, *sizes)


@dataclass(frozen=True)
class LowRank:
    """s dropout(t A), which comes to dX: as of a stage of ``_torch_gemm.py``."""

    t: torch.Tensor
    lora_a: torch.Tensor
    scaling: torch.Tensor
    rng: torch.Tensor | None
    threshold: int


class Int4Kernels(Protocol):
    """What a backend supplies, on tensors of one device; no size is zero."""

    engines: tuple[str, ...]
    multiprocessors: int

    def dequantize(
        self,
        out: torch.Tensor,
        weight: Weight,
        *,
        first: int = 0,
        perm: torch.Tensor | None = None,
    ) -> None:
        """out (N, columns) = the columns of W from ``first``, an even one, on, in any dtype; with
        perm, where these are all, column j goes to column perm[j]."""

    def linear(
        self,
        choice: Any,
        *,
        y: torch.Tensor,
        x: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        splits: int,
    ) -> None:
        """y = x W^T + b by an engine other than panels; x has unit column stride, the bias is
        contiguous, and K is cut into ``splits`` parts where the engine lets itself be told."""

    def input_gradient(
        self,
        choice: Any,
        *,
        dx: torch.Tensor,
        grad: torch.Tensor,
        weight: Weight,
        low_rank: LowRank | None,
    ) -> None:
        """dx = grad W + the low-rank term, in the order of the codes, by an engine other than
        panels; grad has unit column stride and dx is contiguous."""


@functools.cache
def _table(codebook: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(TABLES[codebook], dtype=torch.float32, device=device)


def weight_of(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
) -> Weight:
    """An op's operands as the kernels take them; copies only where strides demand one."""
    table = None if codebook == "int4" else _table(codebook, codes.device)
    zero = None if zero is None else zero.contiguous()
    return Weight(codes.contiguous(), scale.contiguous(), zero, table, k, group_size)


def why_dtypes(*dtypes: torch.dtype) -> str | None:
    """Why no kernel takes these dtypes, or None where they do."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"{name_of(dtype)} is not one of {', '.join(map(name_of, DTYPES))}"
    return None


def why_packed(packed: torch.Tensor | None) -> str | None:
    """Why codes that another backend packed cannot be read."""
    return None if packed is None else "the codes are packed for the CPU"


# -- which engine ----------------------------------------------------------------------------------


def problem_of(
    lead: torch.Tensor,
    weight: Weight,
    *,
    direction: str = "forward",
    adapter: str = "",
    dropout: bool = False,
) -> _int4_engine.Problem:
    """The product of a matrix x, or dY, as the plan sees it."""
    zero = "none"
    if weight.zero is not None:
        zero = "float" if weight.zero.is_floating_point() else "uint8"
    rows = (lead.stride(0) * lead.element_size(), -(-weight.k // 2), lead.data_ptr())
    return _int4_engine.Problem(
        m=lead.shape[0],
        n=weight.n,
        k=weight.k,
        group_size=weight.group_size,
        dtype=name_of(lead.dtype),
        zero=zero,
        table=weight.table is not None,
        aligned=all(place % 16 == 0 for place in (*rows, weight.codes.data_ptr())),
        direction=direction,
        adapter=adapter,
        dropout=dropout,
    )


def _choose_gradient(
    engines: Sequence[str], grad: torch.Tensor, weight: Weight, **term: Any
) -> _int4_engine.Choice:
    """The engine for dX of a matrix dY; ``term`` says what low-rank term comes to it."""
    problem = problem_of(grad, weight, direction="backward", **term)
    return _int4_engine.plan(problem, device_name(grad.device), engines)


_NO_PRODUCT = "panels: there is no product"


def explain_forward(
    engines: Sequence[str],
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *rest: Any,
) -> str:
    """Which engine a forward of these arguments would run on, and why."""
    k = x.shape[-1]
    x = matrix_rows(x, k)
    if x.shape[0] == 0 or codes.numel() == 0:
        return _NO_PRODUCT
    *_, group_size, codebook = rest
    weight = weight_of(codes, scale, zero, k, group_size, codebook)
    choice = _int4_engine.plan(problem_of(x, weight), device_name(x.device), engines)
    return f"{choice.engine}: {choice.why}"


def explain_gradient(
    engines: Sequence[str],
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *rest: Any,
) -> str:
    """Which engine dX of these arguments, of either backward, would run on, and why."""
    *operands, group_size, codebook, need = rest
    term: dict[str, Any] = {}
    if len(operands) > 3:
        lora_a, _, _, _, p, rng, _, _ = operands
        k, term = lora_a.shape[1], low_rank_term(lora_a, p, rng)
    else:
        _, _, k = operands
    grad = matrix_rows(grad, codes.shape[0])
    if not need[0] or grad.numel() == 0 or k == 0:
        return _NO_PRODUCT
    weight = weight_of(codes, scale, zero, k, group_size, codebook)
    choice = _choose_gradient(engines, grad, weight, **term)
    return f"{choice.engine}: {choice.why}"


# -- forward and backward --------------------------------------------------------------------------


def dequantize(
    into: Callable[..., None],
    out: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
    dtype: torch.dtype,
) -> None:
    """int4_dequantize, by a backend's :meth:`Int4Kernels.dequantize`."""
    if out.numel():
        perm = None if perm is None else perm.contiguous()
        into(out, weight_of(codes, scale, zero, k, group_size, codebook), perm=perm)


def _in_order_of_codes(x: torch.Tensor, perm: torch.Tensor | None) -> torch.Tensor:
    return x if perm is None else x.index_select(1, perm)


def forward(
    kernels: Int4Kernels,
    y: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
) -> None:
    """int4_linear: y = x W^T + b."""
    n, k = codes.shape[0], x.shape[-1]
    x = matrix_rows(x, k)
    m = x.shape[0]
    y = y.view(m, n)
    if m == 0 or n == 0:
        return
    if k == 0:
        y.zero_() if bias is None else y.copy_(bias.expand_as(y))
        return
    x = _in_order_of_codes(x, perm)
    weight = weight_of(codes, scale, zero, k, group_size, codebook)
    problem = problem_of(x, weight)
    choice = _int4_engine.plan(problem, device_name(x.device), kernels.engines)
    if choice.engine != "panels":
        splits = 1
        if choice.engine in ("gemv", "mma"):
            splits = _int4_engine.splits_of(choice.engine, problem, kernels.multiprocessors)
        bias = None if bias is None else bias.contiguous()
        kernels.linear(choice, y=y, x=x, weight=weight, bias=bias, splits=splits)
        return
    width = _int4_engine.panel_width(n, k, x.element_size())
    panel = x.new_empty((width, k))
    for first in range(0, n, width):
        part = panel[: min(width, n - first)]
        kernels.dequantize(part, weight.rows(first, part.shape[0]))
        out = y[:, first : first + part.shape[0]]
        if bias is None:
            torch.mm(x, part.T, out=out)
        else:
            torch.addmm(bias[first : first + part.shape[0]], x, part.T, out=out)


def input_gradient(
    kernels: Int4Kernels,
    choice: _int4_engine.Choice,
    dx: torch.Tensor,
    grad: torch.Tensor,
    weight: Weight,
    perm: torch.Tensor | None,
) -> None:
    """dx (M, K) = grad W. A panel has all rows of W and some columns, so that each element of dx is
    one sum, rounded once."""
    if choice.engine != "panels":
        out = dx if perm is None else torch.empty_like(dx)
        kernels.input_gradient(choice, dx=out, grad=grad, weight=weight, low_rank=None)
        if perm is not None:
            dx.index_copy_(1, perm.long(), out)
        return
    width = _int4_engine.panel_width(weight.k, weight.n, grad.element_size())
    for first in range(0, weight.k, width):
        columns = min(width, weight.k - first)
        panel = grad.new_empty((weight.n, columns))
        kernels.dequantize(panel, weight, first=first)
        if perm is None:
            torch.mm(grad, panel, out=dx[:, first : first + columns])
        else:
            dx.index_copy_(1, perm[first : first + columns].long(), torch.mm(grad, panel))


def grid_gradients(
    kernels: Int4Kernels,
    dscale: torch.Tensor | None,
    dzero: torch.Tensor | None,
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: Weight,
) -> None:
    """With D = dY^T X, x in the order of the codes: dscale = sums of D * (c - zero) over the
    groups, dzero = -scale * sums of D. D is made some rows at a time."""
    n, k = weight.n, weight.k
    groups = weight.scale.shape[1]
    width = _int4_engine.panel_width(n, k, 4)
    ones = torch.ones((width, groups), dtype=torch.float32, device=x.device)
    steps = torch.empty((width, k), dtype=torch.float32, device=x.device)
    for first in range(0, n, width):
        part = weight.rows(first, min(width, n - first))
        rows = slice(first, first + part.n)
        d = torch.mm(grad[:, rows].T, x).float()
        if dzero is not None:
            sums = _group_sums(d, groups, weight.group_size)
            dzero[rows] = (-part.scale.float() * sums).to(dzero.dtype)
        if dscale is not None:
            zero = part.zero
            if zero is not None and zero.is_floating_point():
                zero = zero.float()  # the dtype of its scale
            unscaled = Weight(part.codes, ones[: part.n], zero, part.table, k, weight.group_size)
            kernels.dequantize(steps[: part.n], unscaled)
            dscale[rows] = _group_sums(d * steps[: part.n], groups, weight.group_size).to(
                dscale.dtype
            )


def _group_sums(matrix: torch.Tensor, groups: int, group_size: int) -> torch.Tensor:
    n, k = matrix.shape
    whole = k // group_size
    sums = matrix.new_empty((n, groups))
    torch.sum(
        matrix[:, : whole * group_size].reshape(n, whole, group_size), dim=2, out=sums[:, :whole]
    )
    if whole < groups:
        torch.sum(matrix[:, whole * group_size :], dim=1, out=sums[:, whole])
    return sums


def _base_gradients(
    kernels: Int4Kernels,
    dscale: torch.Tensor | None,
    dzero: torch.Tensor | None,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: Weight,
    perm: torch.Tensor | None,
) -> None:
    """Those of scale and zero that are not None, whatever size is zero."""
    wanted = [one for one in (dscale, dzero) if one is not None]
    if grad.shape[0] == 0:
        for one in wanted:
            one.zero_()
    elif wanted and weight.n and weight.k:
        assert x is not None
        x = _in_order_of_codes(matrix_rows(x, weight.k), perm)
        grid_gradients(kernels, dscale, dzero, grad, x, weight)


def backward(
    kernels: Int4Kernels,
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dzero: torch.Tensor,
    dbias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
    need: Sequence[bool],
) -> None:
    """int4_linear_backward; computes what ``need`` (x, scale, zero, b) asks for and no more."""
    n = codes.shape[0]
    grad = matrix_rows(grad, n)
    weight = weight_of(codes, scale, zero, k, group_size, codebook)
    if need[0]:
        _dx(kernels, dx.view(grad.shape[0], k), grad, weight, perm)
    grids = (dscale if need[1] else None, dzero if need[2] else None)
    _base_gradients(kernels, *grids, grad, x, weight, perm)
    if need[3]:
        torch.sum(grad, dim=0, out=dbias)


def _dx(
    kernels: Int4Kernels,
    dx: torch.Tensor,
    grad: torch.Tensor,
    weight: Weight,
    perm: torch.Tensor | None,
    choice: _int4_engine.Choice | None = None,
) -> None:
    """dx = grad W, whatever size is zero; by the engine chosen, or one to be chosen."""
    if dx.numel() and weight.n:
        choice = choice or _choose_gradient(kernels.engines, grad, weight)
        input_gradient(kernels, choice, dx, grad, weight, perm)
    else:
        dx.zero_()


# -- with a low-rank update beside it --------------------------------------------------------------


def adapted_forward(
    kernels: Int4Kernels,
    stages: Stages,
    y: torch.Tensor,
    xa: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
) -> None:
    """int4_lora_linear: y = x W^T + b, then lora_linear's stages on it."""

    def base(out: torch.Tensor, rows: torch.Tensor) -> None:
        operands = (codes, scale, zero, bias, perm, packed, group_size, codebook)
        forward(kernels, out, rows, *operands)

    operands = (x, None, lora_a, lora_b, bias, scaling, p, rng, None, None, None)
    lora_forward(stages, y, xa, *operands, base=base)


def adapted_backward(
    kernels: Int4Kernels,
    stages: Stages,
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dzero: torch.Tensor,
    dlora_a: torch.Tensor,
    dlora_b: torch.Tensor,
    dbias: torch.Tensor,
    dscaling: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor | None,
    scaling: torch.Tensor,
    p: float,
    rng: torch.Tensor | None,
    perm: torch.Tensor | None,
    packed: torch.Tensor | None,
    group_size: int,
    codebook: str,
    need: Sequence[bool],
) -> None:
    """int4_lora_linear_backward; computes what ``need`` (x, scale, zero, A, B, b, s) asks for."""
    weight = weight_of(codes, scale, zero, lora_a.shape[1], group_size, codebook)
    grids = (dscale if need[1] else None, dzero if need[2] else None)
    _base_gradients(kernels, *grids, matrix_rows(grad, weight.n), x, weight, perm)

    choice = None
    term = low_rank_term(lora_a, p, rng)
    grad = matrix_rows(grad, weight.n)
    if need[0] and grad.numel() and weight.k:
        choice = _choose_gradient(kernels.engines, grad, weight, **term)

    def base(out: torch.Tensor, rows: torch.Tensor) -> None:
        _dx(kernels, out, rows, weight, perm, choice)

    def with_low_rank(dx: torch.Tensor, grad: torch.Tensor, **low_rank: Any) -> None:
        term = LowRank(**low_rank)
        kernels.input_gradient(choice, dx=dx, grad=grad, weight=weight, low_rank=term)

    # Its columns are A's, in their own order.
    whole = choice is not None and choice.engine != "panels" and perm is None
    none = grad.new_empty(0)
    outputs = (dx, none, dlora_a, dlora_b, dbias, dscaling, none)
    adapter = (lora_a, lora_b, xa, scaling, p, rng)
    wanted = (need[0], False, need[3], need[4], need[5], need[6], False)
    operands = (*outputs, grad, x, None, *adapter, None, None, None, wanted)
    lora_backward(stages, *operands, base=base, base_dx=with_low_rank if whole else None)


def low_rank_term(lora_a: torch.Tensor, p: float, rng: torch.Tensor | None) -> dict[str, Any]:
    """A low-rank term as :func:`problem_of` takes it."""
    return {"adapter": name_of(lora_a.dtype), "dropout": rng is not None and p > 0}
