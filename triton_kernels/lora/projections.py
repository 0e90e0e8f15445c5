"""lora_projections and its backward on Triton: torch's GEMM with the stages of lora_linear, and one
kernel of its own, which updates dX for all projections at once.

Symbols as in ``pyfastft/ops/lora.md``. Masks go over every edge, so any size works; a rank below 16
is padded by masked loads. Offsets into matrices are 64-bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft._op import implement
from pyfastft._random import GROUP, dropout_scale
from pyfastft.native import _torch_gemm_lists
from pyfastft.native._torch_gemm_lists import Masks
from pyfastft.triton_kernels._common import (
    DOT_TYPES,
    OPTIONS,
    device_of,
    dropout_keep,
    why_no_triton,
)
from pyfastft.triton_kernels._plan import Problem, plan
from pyfastft.triton_kernels.lora._stages import TritonStages


@triton.jit(do_not_specialize=["M", "P", "threshold"])
def _lora_update_all_kernel(
    dx_ptr,
    t_ptr,
    a_ptr,
    scaling_ptr,
    rng_ptr,
    M,
    K,
    R,
    P,
    threshold,
    scale,
    DOT: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes dx (M, K) += scale * sum_j s_j select_j(t_j a_j) over P projections of one rank.

    Tiling: a program owns a tile of dx, and loops over projections and over the rank.
    Numerics: t is rounded to DOT; float32 from there on, one rounding to dx's dtype.
    Traffic: dx read and written once, whatever P. Bound by memory, or by Philox from P = 2 or so.
    Relies on: t (P, M, R), a (P, R, K) and rng (P, 2) are C-contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_C
    columns = first + tl.arange(0, BLOCK_C).to(tl.int64)
    dx_ptrs = dx_ptr + rows[:, None] * K + columns[None, :]
    inside = (rows < M)[:, None] & (columns < K)[None, :]

    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for j in range(0, P):
        t_rows = (tl.cast(j, tl.int64) * M + rows)[:, None] * R
        a_first = tl.cast(j, tl.int64) * R
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for first_rank in range(0, R, BLOCK_R):
            ranks = first_rank + tl.arange(0, BLOCK_R).to(tl.int64)
            t = tl.load(
                t_ptr + t_rows + ranks[None, :],
                mask=(rows < M)[:, None] & (ranks < R)[None, :],
                other=0.0,
            )
            a = tl.load(
                a_ptr + (a_first + ranks)[:, None] * K + columns[None, :],
                mask=(ranks < R)[:, None] & (columns < K)[None, :],
                other=0.0,
            )
            acc = tl.dot(t.to(DOT), a, acc, input_precision="ieee")
        stream = rng_ptr + 2 * j
        keep = dropout_keep(stream, rows, first, K, threshold, BLOCK_C, GROUPED)
        total += tl.where(keep, acc, 0.0) * (tl.load(scaling_ptr + j) * scale)

    dx = tl.load(dx_ptrs, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)


class ProjectionStages(TritonStages, _torch_gemm_lists.SeveralStages):
    """The stages of lora_linear, and dX updated for all projections at once."""

    def dx_of_all(
        self,
        *,
        dx: torch.Tensor,
        ts: Sequence[torch.Tensor],
        lora_a: Sequence[torch.Tensor],
        scaling: Sequence[torch.Tensor],
        masks: Masks,
    ) -> None:
        r, threshold = lora_a[0].shape[0], masks.thresholds[0]
        alike = all(a.shape[0] == r for a in lora_a) and len(set(masks.thresholds)) == 1
        if len(ts) == 1 or not alike or masks.streams is None:
            super().dx_of_all(dx=dx, ts=ts, lora_a=lora_a, scaling=scaling, masks=masks)
            return
        (m, k), adapter = dx.shape, lora_a[0]
        half, grouped = adapter.dtype is not torch.float32, k % GROUP == 0
        launch = plan(Problem("update", m, k, r, half, mask_by_element=not grouped), self._device)
        _lora_update_all_kernel[(triton.cdiv(m, launch.block_m), triton.cdiv(k, launch.block_c))](
            dx,
            torch.stack(list(ts)),
            torch.stack(list(lora_a)),
            torch.stack([s.reshape(()) for s in scaling]),
            masks.streams,
            M=m,
            K=k,
            R=r,
            P=len(ts),
            threshold=threshold,
            scale=dropout_scale(threshold),
            DOT=DOT_TYPES[adapter.dtype],
            GROUPED=grouped,
            BLOCK_M=launch.block_m,
            BLOCK_C=launch.block_c,
            BLOCK_R=launch.block_r,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **OPTIONS,
        )


def _unsupported(lead: torch.Tensor | Sequence[torch.Tensor], *_: Any) -> str | None:
    return why_no_triton(lead if isinstance(lead, torch.Tensor) else lead[0])


@implement("lora_projections", "triton", unsupported=_unsupported)
def lora_projections(ys: Any, xas: Any, x: torch.Tensor, *args: Any) -> None:
    with torch.cuda.device_of(x):
        stages = TritonStages(device_of(x))
        _torch_gemm_lists.projections_forward(stages, ys, xas, x, *args)


@implement("lora_projections_backward", "triton", unsupported=_unsupported)
def lora_projections_backward(*args: Any) -> None:
    """Six outputs, then the op's arguments."""
    grad = args[6][0]
    with torch.cuda.device_of(grad):
        _torch_gemm_lists.projections_backward(ProjectionStages(device_of(grad)), *args)
