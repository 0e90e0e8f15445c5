"""The Triton stages of lora_linear: the mask bit for bit, each stage's accuracy, and the plans.

The whole op runs on every sample in test_registry.py; here several programs, parts and ranks meet.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

import pyfastft  # noqa: E402, F401
from pyfastft._random import dropout_threshold  # noqa: E402
from pyfastft.reference._dropout import dropout, keep_mask, philox4x32  # noqa: E402
from pyfastft.testing.tolerance import assert_accurate, assert_exact  # noqa: E402
from pyfastft.triton_kernels import _plan  # noqa: E402
from pyfastft.triton_kernels._common import INTERPRETED, dropout_keep  # noqa: E402
from pyfastft.triton_kernels.lora._stages import TritonStages  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# Enough processors that reductions are cut into parts even at these sizes.
STAGES = TritonStages(_plan.Device(multiprocessors=2, capability=(8, 0)))
P = 0.3
THRESHOLD = dropout_threshold(P)
SEED_AND_OFFSET = (0x7234567890ABCDEF, (5 << 32) + 7)
PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
# M, C, R: off every tile; a rank over 16 with groups of 8; one row.
SHAPES = ((67, 83, 5), (33, 136, 20), (1, 40, 1))
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"
)


def rng() -> torch.Tensor:
    return torch.tensor(SEED_AND_OFFSET, device=DEVICE)


@triton.jit
def _mask_kernel(
    keep_ptr,
    rng_ptr,
    first_row,
    width,
    threshold,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) * BLOCK_C
    rows = tl.cast(first_row, tl.int64) + row
    keep = dropout_keep(rng_ptr, rows, first_column, width, threshold, BLOCK_C, GROUPED)
    columns = first_column + tl.arange(0, BLOCK_C)
    out = row[:, None] * width + columns[None, :]
    tl.store(keep_ptr + out, keep.to(tl.int8), mask=(columns < width)[None, :])


def draw_mask(rows: int, width: int, first_row: int, grouped: bool) -> torch.Tensor:
    keep = torch.full((rows, width), 2, dtype=torch.int8, device=DEVICE)
    grid = (triton.cdiv(width, 32),)
    _mask_kernel[grid](
        keep, rng(), first_row, width, THRESHOLD, GROUPED=grouped, BLOCK_M=rows, BLOCK_C=32
    )
    return keep.bool()


@needs_kernels
@pytest.mark.parametrize(
    ("width", "grouped"), [(40, True), (40, False), (37, False)], ids=["grouped", "element", "odd"]
)
def test_mask_is_the_references(width: int, grouped: bool) -> None:
    expected = keep_mask(16 * width, THRESHOLD, rng()).view(16, width)
    assert_exact(draw_mask(16, width, 0, grouped), expected, "mask")


@needs_kernels
@pytest.mark.parametrize("grouped", [True, False])
def test_mask_of_elements_beyond_64_bits_of_offset(grouped: bool) -> None:
    """Rows so far down that the linear index and the group's number both need more than 32 bits."""
    width, first_row = 40, (1 << 36) + 3
    element = first_row * width + torch.arange(16 * width, device=DEVICE)
    seed, offset = rng()
    words = torch.stack(philox4x32(seed, element // 8, offset), dim=-1)
    half = element % 8
    word = words.gather(-1, (half // 2)[:, None])[:, 0]
    expected = (torch.where(half % 2 == 0, word & 0xFFFF, word >> 16) >= THRESHOLD).view(16, width)
    assert_exact(draw_mask(16, width, first_row, grouped), expected, "mask")


class Operands:
    """Inputs of the stages in one precision, and their float64 copies."""

    def __init__(self, shape: tuple[int, int, int], precision: str) -> None:
        base, adapter = PRECISIONS[precision]
        m, c, r = shape
        # Rows of a wider matrix: a row stride that is not the width.
        self.wide = torch.randn(m, c + 3).to(DEVICE, base)[:, :c]
        self.thin = torch.randn(m, r).to(DEVICE, adapter)
        self.t = torch.randn(m, r).to(DEVICE)
        self.a = (torch.randn(r, c) / c**0.5).to(DEVICE, adapter)
        self.b = torch.randn(c, r).to(DEVICE, adapter)
        self.scaling = torch.tensor([0.75], device=DEVICE)
        self.base, self.adapter = base, adapter

    def filled(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@pytest.fixture(params=SHAPES, ids=lambda shape: "m{}c{}r{}".format(*shape))
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.fixture(params=PRECISIONS)
def operands(request: pytest.FixtureRequest, shape: tuple[int, int, int]) -> Operands:
    return Operands(shape, request.param)


@needs_kernels
def test_down_and_its_gradient(operands: Operands, shape: tuple[int, int, int]) -> None:
    m, c, r = shape
    x, a, t, s, adapter = operands.wide, operands.a, operands.t, operands.scaling, operands.adapter
    xa = operands.filled(m, r, dtype=adapter)
    STAGES.down(xa=xa, x=x, lora_a=a, rng=rng(), threshold=THRESHOLD)
    dropped, truth = dropout(x, P, rng()), dropout(x.double(), P, rng())
    assert_accurate(xa, truth @ a.double().T, dropped.to(adapter) @ a.T, what="xa")

    da = operands.filled(r, c, dtype=adapter)
    STAGES.down_grad(dlora_a=da, t=t, x=x, scaling=s, rng=rng(), threshold=THRESHOLD)
    naive = (s * t).to(adapter).T @ dropped.to(adapter)
    assert_accurate(da, (s.double() * t.double()).T @ truth, naive, gradient=True, what="dA")


@needs_kernels
def test_up_and_its_gradient(operands: Operands, shape: tuple[int, int, int]) -> None:
    m, c, r = shape
    grad, xa, b, s = operands.wide, operands.thin, operands.b, operands.scaling
    y = grad.clone(memory_format=torch.contiguous_format)
    STAGES.up(y=y, xa=xa, lora_b=b, scaling=s)
    truth = grad.double() + s.double() * (xa.double() @ b.double().T)
    naive = grad + (s.to(operands.adapter) * (xa @ b.T)).to(operands.base)
    assert_accurate(y, truth, naive, what="y")

    t = operands.filled(m, r, dtype=torch.float32)
    db = operands.filled(c, r, dtype=operands.adapter)
    ds = operands.filled(1, dtype=torch.float32)
    STAGES.up_grad(t=t, dlora_b=db, dscaling=ds, grad=grad, xa=xa, lora_b=b, scaling=s)
    wide = grad.to(operands.adapter)
    t_truth = grad.double() @ b.double()
    assert_accurate(t, t_truth, wide.float() @ b.float(), gradient=True, what="t")
    db_truth = s.double() * (grad.double().T @ xa.double())
    naive = s.to(operands.adapter) * (wide.T @ xa)
    assert_accurate(db, db_truth, naive, gradient=True, what="dB")
    ds_truth = (t_truth * xa.double()).sum().view(1)
    naive = ((wide @ b) * xa).sum().view(1).float()
    assert_accurate(ds, ds_truth, naive, gradient=True, what="ds")

    alone = operands.filled(m, r, dtype=torch.float32)
    STAGES.up_grad(t=alone, dlora_b=None, dscaling=None, grad=grad, xa=None, lora_b=b, scaling=s)
    assert_accurate(alone, t_truth, wide.float() @ b.float(), gradient=True, what="t alone")


@needs_kernels
def test_dx(operands: Operands) -> None:
    t, a, s, base = operands.t, operands.a, operands.scaling, operands.base
    before = operands.wide.contiguous()
    dx = before.clone()
    STAGES.dx(dx=dx, t=t, lora_a=a, scaling=s, rng=rng(), threshold=THRESHOLD)
    truth = before.double() + dropout(s.double() * t.double() @ a.double(), P, rng())
    naive = before + dropout((s * t).to(operands.adapter) @ a, P, rng()).to(base)
    assert_accurate(dx, truth, naive, gradient=True, what="dx")


@needs_kernels
def test_nothing_under_the_mask_leaks() -> None:
    keep = keep_mask(16 * 40, THRESHOLD, rng()).view(16, 40)
    x = torch.where(keep, torch.randn(16, 40, device=DEVICE), float("nan"))
    a, s = torch.randn(3, 40, device=DEVICE), torch.ones(1, device=DEVICE)
    xa, da = torch.empty(16, 3, device=DEVICE), torch.empty(3, 40, device=DEVICE)
    STAGES.down(xa=xa, x=x, lora_a=a, rng=rng(), threshold=THRESHOLD)
    STAGES.down_grad(dlora_a=da, t=xa, x=x, scaling=s, rng=rng(), threshold=THRESHOLD)
    assert bool(xa.isfinite().all())
    assert bool(da.isfinite().all())


def test_every_rank_has_a_plan() -> None:
    device = _plan.Device(multiprocessors=132, capability=(9, 0))
    for stage in ("project", "update", "gradient"):
        for half in (True, False):
            for rank in (1, 15, 16, 17, 33, 64, 100, 129, 1000):
                for rows, columns in ((1, 1), (1, 4096), (100_000, 64), (8192, 14336)):
                    problem = _plan.Problem(stage, rows, columns, rank, half)
                    launch = _plan.plan(problem, device)
                    assert launch.block_r >= 16
                    reduced = {"project": columns, "update": rank, "gradient": rows}[stage]
                    # The parts cover the reduced dimension, and none is empty.
                    assert (launch.splits - 1) * launch.part < reduced
                    assert reduced <= launch.splits * launch.part or stage == "update"


def test_a_large_reduction_fills_the_device() -> None:
    device = _plan.Device(multiprocessors=132, capability=(9, 0))
    launch = _plan.plan(_plan.Problem("gradient", 8192, 4096, 16, True), device)
    programs = launch.splits * -(-4096 // launch.block_c)
    assert programs >= device.multiprocessors
