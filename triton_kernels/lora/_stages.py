"""The Triton kernels around torch's GEMM, and the stages of lora_linear built of them.

Symbols as in ``pyfastft/ops/lora.md``. Two of the five stages read a wide matrix and reduce it to
rank R, two update one from rank R, and one does a reduction along the rows as well; so there are
three kernels, in which C stands for the wide dimension (K or N), and two small sums.

Masks go over every edge, so any size works; a rank below 16 is padded by masked loads. Dropped
elements are selected away before they are multiplied. Offsets into matrices are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft._random import GROUP, dropout_scale
from pyfastft.triton_kernels._common import DOT_TYPES, OPTIONS, dropout_keep
from pyfastft.triton_kernels._plan import Device, Launch, Problem, one_pass, plan

# M and the threshold change from call to call: a kernel must not be compiled for their values.
_VARYING = ["M", "threshold"]


@triton.jit(do_not_specialize=_VARYING)
def _lora_project_kernel(
    out_ptr,
    x_ptr,
    v_ptr,
    rng_ptr,
    M,
    C,
    R,
    part,
    x_stride_m,
    v_stride_c,
    v_stride_r,
    threshold,
    scale,
    DOT: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes out (splits, M, R) = scale * select(x) v over one part of the columns each.

    Tiling: a program owns a row tile, a rank tile and a part, and loops over the part's columns.
    Numerics: dot products of DOT, accumulated in float32; the dropout scale is applied once, after.
    Traffic: x once per rank tile, v once per row tile. Bound by memory at small R.
    Relies on: x has unit column stride; part is a multiple of BLOCK_C. Triton specialises it as a
    multiple of 16, without which the loads of x would be 2 bytes each.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    begin = split * part
    end = tl.minimum(begin + part, C)

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(begin, end, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C).to(tl.int64)
        x = tl.load(
            x_ptr + rows[:, None] * x_stride_m + columns[None, :],
            mask=(rows < M)[:, None] & (columns < C)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + columns[:, None] * v_stride_c + ranks[None, :] * v_stride_r,
            mask=(columns < C)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )
        if DROPOUT:
            x = tl.where(dropout_keep(rng_ptr, rows, first, C, threshold, BLOCK_C, GROUPED), x, 0.0)
        acc = tl.dot(x.to(DOT), v, acc, input_precision="ieee")

    tl.store(
        out_ptr + (split.to(tl.int64) * M + rows)[:, None] * R + ranks[None, :],
        (acc * scale).to(out_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (ranks < R)[None, :],
    )


@triton.jit(do_not_specialize=_VARYING)
def _lora_update_kernel(
    out_ptr,
    u_ptr,
    v_ptr,
    scaling_ptr,
    rng_ptr,
    M,
    C,
    R,
    v_stride_r,
    v_stride_c,
    threshold,
    scale,
    DOT: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes out (M, C) += s * scale * select(u v), the mask that of out's elements.

    Tiling: a program owns a tile of out and loops over the rank.
    Numerics: u is rounded to DOT; float32 from there on, one rounding to out's dtype.
    Traffic: out read and written once. Bound by memory.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_C
    columns = first + tl.arange(0, BLOCK_C).to(tl.int64)
    out_ptrs = out_ptr + rows[:, None] * C + columns[None, :]
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    # Read first: the products run while it is on its way.
    out = tl.load(out_ptrs, mask=inside, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first_rank in range(0, R, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R).to(tl.int64)
        u = tl.load(
            u_ptr + rows[:, None] * R + ranks[None, :],
            mask=(rows < M)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + ranks[:, None] * v_stride_r + columns[None, :] * v_stride_c,
            mask=(ranks < R)[:, None] & (columns < C)[None, :],
            other=0.0,
        )
        acc = tl.dot(u.to(DOT), v, acc, input_precision="ieee")

    if DROPOUT:
        acc = tl.where(dropout_keep(rng_ptr, rows, first, C, threshold, BLOCK_C, GROUPED), acc, 0.0)
    acc = out.to(tl.float32) + acc * (tl.load(scaling_ptr) * scale)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def _lora_gradient_kernel(
    parts_ptr,
    t_parts_ptr,
    x_ptr,
    u_ptr,
    v_ptr,
    rng_ptr,
    M,
    C,
    R,
    part,
    x_stride_m,
    parts_stride_c,
    parts_stride_r,
    threshold,
    DOT: tl.constexpr,
    DROPOUT: tl.constexpr,
    GROUPED: tl.constexpr,
    WITH_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes parts (splits, C, R) = select(x)^T u over one part of the rows each; WITH_T also
    t_parts (column tiles, M, R) = x v, from the same reading of x.

    Tiling: a program owns a column tile, a rank tile and a part, and loops over the part's rows.
    Numerics: u is rounded to DOT; float32 sums, reduced over the parts in a fixed order.
    Traffic: x once per rank tile, u once per column tile. Bound by memory at small R.
    Relies on: x has unit column stride; v (C, R) is C-contiguous; part is a multiple of BLOCK_M.
    """
    first = tl.program_id(0) * BLOCK_C
    columns = first + tl.arange(0, BLOCK_C).to(tl.int64)
    ranks = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    if WITH_T:
        v = tl.load(
            v_ptr + columns[:, None] * R + ranks[None, :],
            mask=(columns < C)[:, None] & (ranks < R)[None, :],
            other=0.0,
        )

    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for step in range(0, part, BLOCK_M):
        rows = split * part + step + tl.arange(0, BLOCK_M)
        x = tl.load(
            x_ptr + rows[:, None] * x_stride_m + columns[None, :],
            mask=(rows < M)[:, None] & (columns < C)[None, :],
            other=0.0,
        )
        thin = rows[:, None] * R + ranks[None, :]
        inside = (rows < M)[:, None] & (ranks < R)[None, :]
        u = tl.load(u_ptr + thin, mask=inside, other=0.0)
        if DROPOUT:
            x = tl.where(dropout_keep(rng_ptr, rows, first, C, threshold, BLOCK_C, GROUPED), x, 0.0)
        acc = tl.dot(tl.trans(x.to(DOT)), u.to(DOT), acc, input_precision="ieee")
        if WITH_T:
            t = tl.dot(x.to(DOT), v, input_precision="ieee")
            tile = tl.program_id(0).to(tl.int64) * M * R
            tl.store(t_parts_ptr + tile + thin, t, mask=inside)

    tl.store(
        parts_ptr
        + split * C * R
        + columns[:, None] * parts_stride_c
        + ranks[None, :] * parts_stride_r,
        acc,
        mask=(columns < C)[:, None] & (ranks < R)[None, :],
    )


@triton.jit(do_not_specialize=["count", "size"])
def _sum_parts_kernel(
    out_ptr, parts_ptr, scaling_ptr, count, size, scale, SCALED: tl.constexpr, BLOCK: tl.constexpr
):
    """Computes out (size) = s * scale * the sum of parts (count, size), first to last."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), parts_ptr.dtype.element_ty)
    for i in range(0, count):
        offset = tl.cast(i, tl.int64) * size
        acc += tl.load(parts_ptr + offset + index, mask=index < size, other=0.0)
    if SCALED:
        acc *= tl.load(scaling_ptr) * scale
    tl.store(out_ptr + index, acc.to(out_ptr.dtype.element_ty), mask=index < size)


@triton.jit(do_not_specialize=["size", "part"])
def _dot_parts_kernel(parts_ptr, a_ptr, b_ptr, size, part, BLOCK: tl.constexpr):
    """Computes parts (programs) = sum(a * b) over one part of the elements each.

    Numerics: float64, because every element of two matrices ends in one number that may cancel.
    """
    pid = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float64)
    for step in range(0, part, BLOCK):
        index = pid * part + step + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + index, mask=index < size, other=0.0).to(tl.float64)
        acc += a * tl.load(b_ptr + index, mask=index < size, other=0.0).to(tl.float64)
    tl.store(parts_ptr + pid, tl.sum(acc, axis=0))


# -- launchers -------------------------------------------------------------------------------------

# One program of the small sums: enough elements for every thread of 4 warps to load 16 bytes.
_SUM_BLOCK = 512
# At most this many parts of a dot product; one program adds them up.
_DOT_PARTS = 64


def _meta(launch: Launch, adapter: torch.Tensor) -> dict[str, Any]:
    """What every kernel is compiled for, and how it is launched."""
    return {
        "DOT": DOT_TYPES[adapter.dtype],
        "BLOCK_M": launch.block_m,
        "BLOCK_C": launch.block_c,
        "BLOCK_R": launch.block_r,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **OPTIONS,
    }


def masking(columns: int, rng: torch.Tensor | None, threshold: int) -> dict[str, Any]:
    """Whether and how a kernel drops elements of a matrix with so many columns."""
    dropping = rng is not None and threshold > 0
    return {
        "rng_ptr": rng if dropping else None,
        "threshold": threshold,
        "DROPOUT": dropping,
        "GROUPED": dropping and columns % GROUP == 0,
    }


def sum_parts(
    out: torch.Tensor, parts: torch.Tensor, scaling: torch.Tensor | None = None, scale: float = 1.0
) -> None:
    """out = s * scale * the sum over the first dimension of parts."""
    size = out.numel()
    _sum_parts_kernel[(triton.cdiv(size, _SUM_BLOCK),)](
        out,
        parts,
        scaling,
        parts.shape[0],
        size,
        scale,
        SCALED=scaling is not None,
        BLOCK=_SUM_BLOCK,
        enable_fp_fusion=True,
    )


class TritonStages:
    """The five stages of :class:`pyfastft.native._torch_gemm.Stages` on one device."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def _plan(
        self, stage: str, wide: torch.Tensor, adapter: torch.Tensor, rank: int, threshold: int = 0
    ) -> Launch:
        problem = Problem(
            stage=stage,
            rows=wide.shape[0],
            columns=wide.shape[1],
            rank=rank,
            half=adapter.dtype is not torch.float32,
            mask_by_element=threshold > 0 and wide.shape[1] % GROUP != 0,
        )
        return plan(problem, self._device)

    def _project(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        v: torch.Tensor,
        rng: torch.Tensor | None = None,
        threshold: int = 0,
    ) -> None:
        """out (M, R) = dropout(x) v for v of shape (C, R) and any strides."""
        (m, c), r = x.shape, v.shape[1]
        launch = self._plan("project", x, v, r, threshold)
        parts = out
        if launch.splits > 1:
            parts = out.new_empty((launch.splits, m, r), dtype=torch.float32)
        grid = (triton.cdiv(m, launch.block_m), triton.cdiv(r, launch.block_r), launch.splits)
        _lora_project_kernel[grid](
            parts,
            x,
            v,
            M=m,
            C=c,
            R=r,
            part=launch.part,
            x_stride_m=x.stride(0),
            v_stride_c=v.stride(0),
            v_stride_r=v.stride(1),
            scale=dropout_scale(threshold),
            **masking(c, rng, threshold),
            **_meta(launch, v),
        )
        if parts is not out:
            sum_parts(out, parts)

    def _update(
        self,
        out: torch.Tensor,
        u: torch.Tensor,
        v: torch.Tensor,
        scaling: torch.Tensor,
        rng: torch.Tensor | None = None,
        threshold: int = 0,
    ) -> None:
        """out (M, C) += s dropout(u v) for v of shape (R, C) and any strides."""
        (m, c), r = out.shape, v.shape[0]
        launch = self._plan("update", out, v, r, threshold)
        _lora_update_kernel[(triton.cdiv(m, launch.block_m), triton.cdiv(c, launch.block_c))](
            out,
            u,
            v,
            scaling,
            M=m,
            C=c,
            R=r,
            v_stride_r=v.stride(0),
            v_stride_c=v.stride(1),
            scale=dropout_scale(threshold),
            **masking(c, rng, threshold),
            **_meta(launch, v),
        )

    def _gradient(
        self,
        launch: Launch,
        out: torch.Tensor,
        x: torch.Tensor,
        u: torch.Tensor,
        strides: tuple[int, int],
        scaling: torch.Tensor,
        rng: torch.Tensor | None = None,
        threshold: int = 0,
        t: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
    ) -> None:
        """out = s dropout(x)^T u, ``strides`` its strides along C and R; t = x v beside it."""
        (m, c), r = x.shape, u.shape[1]
        tiles = triton.cdiv(c, launch.block_c)
        parts = out.new_empty((launch.splits, *out.shape), dtype=torch.float32)
        t_parts = t
        if t is not None and tiles > 1:
            t_parts = t.new_empty((tiles, m, r))
        _lora_gradient_kernel[(tiles, triton.cdiv(r, launch.block_r), launch.splits)](
            parts,
            t_parts,
            x,
            u,
            v,
            M=m,
            C=c,
            R=r,
            part=launch.part,
            x_stride_m=x.stride(0),
            parts_stride_c=strides[0],
            parts_stride_r=strides[1],
            WITH_T=t is not None,
            **masking(c, rng, threshold),
            **_meta(launch, out),
        )
        sum_parts(out, parts, scaling, dropout_scale(threshold))
        if t is not None and t_parts is not None and t_parts is not t:
            sum_parts(t, t_parts)

    def down(
        self,
        *,
        xa: torch.Tensor,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        rng: torch.Tensor | None,
        threshold: int,
    ) -> None:
        self._project(xa, x, lora_a.T, rng, threshold)

    def up(
        self, *, y: torch.Tensor, xa: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
    ) -> None:
        self._update(y, xa, lora_b.T, scaling)

    def up_grad(
        self,
        *,
        t: torch.Tensor,
        dlora_b: torch.Tensor | None,
        dscaling: torch.Tensor | None,
        grad: torch.Tensor,
        xa: torch.Tensor | None,
        lora_b: torch.Tensor,
        scaling: torch.Tensor,
    ) -> None:
        r = lora_b.shape[1]
        if dlora_b is None:
            self._project(t, grad, lora_b)
        else:
            assert xa is not None
            launch = self._plan("gradient", grad, lora_b, r)
            if one_pass(r, grad.element_size(), launch):
                self._gradient(launch, dlora_b, grad, xa, (r, 1), scaling, t=t, v=lora_b)
            else:
                self._project(t, grad, lora_b)
                self._gradient(launch, dlora_b, grad, xa, (r, 1), scaling)
        if dscaling is not None:
            assert xa is not None
            part = triton.cdiv(triton.cdiv(t.numel(), _DOT_PARTS), _SUM_BLOCK) * _SUM_BLOCK
            parts = t.new_empty((triton.cdiv(t.numel(), part), 1), dtype=torch.float64)
            _dot_parts_kernel[(parts.shape[0],)](
                parts, t, xa, t.numel(), part, BLOCK=_SUM_BLOCK, enable_fp_fusion=True
            )
            sum_parts(dscaling, parts)

    def down_grad(
        self,
        *,
        dlora_a: torch.Tensor,
        t: torch.Tensor,
        x: torch.Tensor,
        scaling: torch.Tensor,
        rng: torch.Tensor | None,
        threshold: int,
    ) -> None:
        launch = self._plan("gradient", x, dlora_a, t.shape[1], threshold)
        self._gradient(launch, dlora_a, x, t, (1, x.shape[1]), scaling, rng, threshold)

    def dx(
        self,
        *,
        dx: torch.Tensor,
        t: torch.Tensor,
        lora_a: torch.Tensor,
        scaling: torch.Tensor,
        rng: torch.Tensor | None,
        threshold: int,
    ) -> None:
        self._update(dx, t, lora_a, scaling, rng, threshold)
