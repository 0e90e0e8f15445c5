"""The Triton kernels of DoRA and of the sums of |U V^T - W|: several programs, parts and tiles of
ranks. The whole ops run on every sample in test_registry.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import pyfastft  # noqa: F401
from pyfastft._op import REGISTRY, backend
from pyfastft.testing.samples import upcast
from pyfastft.testing.tolerance import assert_accurate, assert_exact
from pyfastft.triton_kernels import _plan
from pyfastft.triton_kernels._common import INTERPRETED
from pyfastft.triton_kernels.lora import abs_row_sums, dora

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# Enough processors that reductions are cut into parts even at these sizes.
GPU = _plan.Device(multiprocessors=4, capability=(8, 0))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"
)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def signs(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(torch.rand(*shape) < 0.5, -1.0, 1.0).to(DEVICE, dtype)


def references(name: str, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The truth and the naive result."""
    with backend("reference"):
        return REGISTRY[name](*upcast(args)), REGISTRY[name](*args)


class LargestAllocation(TorchDispatchMode):
    """The elements of the largest tensor that torch makes meanwhile."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        # Of torch's own making: Triton's interpreter copies what it is given.
        if isinstance(result, torch.Tensor) and "new_empty" in str(function):
            self.elements = max(self.elements, result.numel())
        return result


# N, K, R: off every tile, ranks of one tile; ranks of several tiles in every precision.
@pytest.mark.parametrize("size", [(70, 150, 5), (70, 280, 70)], ids=str)
@pytest.mark.parametrize("known", [False, True], ids=["whole", "known"])
def test_norm(size: tuple[int, int, int], known: bool, dtype: torch.dtype) -> None:
    n, k, r = size
    # Rows and columns of a wider matrix.
    weight = (drawn(n, 2 * k) / k**0.5).to(dtype)[:, ::2]
    a, b = (drawn(r, k) / k**0.5).to(dtype), drawn(n, r, dtype=dtype)
    squared = weight.float().square().sum(1) if known else None
    args = (weight, a, b, torch.tensor([0.75], device=DEVICE), squared)
    norm = nan(n)
    with LargestAllocation() as largest:
        dora.row_norms(GPU, norm, *args)
    truth, naive = references("dora_norm", args)
    assert_accurate(norm, truth, naive)
    assert largest.elements < n * k


def test_a_norm_that_cancels_is_zero() -> None:
    a, b = signs(3, 40, dtype=torch.float32), signs(20, 3, dtype=torch.float32)
    norm = nan(20)
    dora.row_norms(GPU, norm, -2 * b @ a, a, b, torch.tensor([2.0], device=DEVICE), None)
    assert_exact(norm, torch.zeros_like(norm))
    less = torch.zeros(20, device=DEVICE)
    dora.row_norms(GPU, norm, -b @ a, a, b, torch.tensor([1.0], device=DEVICE), less)
    assert_exact(norm, torch.zeros_like(norm))


def test_scales_in_parts(dtype: torch.dtype) -> None:
    m, n = 150, 137
    x, grad = drawn(m, 2 * n, dtype=dtype)[:, 1::2], drawn(m, n, dtype=dtype).abs() + 1
    grad = (grad * x.sign()).to(dtype)
    scale, bias = 1 + drawn(n) / 4, drawn(n, dtype=dtype)
    y = nan(m, n, dtype=dtype)
    dora.scaled(y, x, scale, bias)
    assert_accurate(y, *references("scale_columns", (x, scale, bias)))

    assert _plan.parts_of(m, _plan.SCALE_TILE.rows, 2, GPU)[0] > 1
    outputs = nan(m, n, dtype=dtype), nan(n), nan(n, dtype=dtype)
    dora.scaled_backward(GPU, *outputs, grad, x, scale)
    truths, naives = references("scale_columns_backward", (grad, x, scale, [True] * 3))
    for output, truth, naive in zip(outputs, truths, naives, strict=True):
        assert_accurate(output, truth, naive, gradient=True)


# N, K, R: several tiles each way, ranks of one tile and of several.
@pytest.mark.parametrize("size", [(150, 300, 5), (90, 300, 70)], ids=str)
@pytest.mark.parametrize("with_w", [False, True], ids=["product", "difference"])
def test_sums(size: tuple[int, int, int], with_w: bool, dtype: torch.dtype) -> None:
    n, k, r = size
    # Exact in every dtype: no rounding decides a sign, and the sums are integers.
    u, v = signs(r, n, dtype=dtype).T, signs(k, r, dtype=dtype)
    w = signs(k, n, dtype=dtype).T if with_w else None
    difference = u.double() @ v.double().T - (0 if w is None else w.double())
    sums = nan(n)
    with LargestAllocation() as largest:
        abs_row_sums.row_sums(GPU, sums, u, v, w)
    assert_exact(sums.double(), difference.abs().sum(1))

    grad = 1 + drawn(n).abs()
    args = (grad, u, v, w, [True, True, with_w])
    truths, naives = references("abs_row_sums_backward", args)
    du, dv = nan(n, r, dtype=dtype), nan(k, r, dtype=dtype)
    dw = nan(n, k, dtype=dtype) if with_w else None
    transposed = None if w is None else w.T
    with largest:
        abs_row_sums.factor_gradient(GPU, du, dw, grad, u, v, w, grad_of_rows=True)
        abs_row_sums.factor_gradient(GPU, dv, None, grad, v, u, transposed, grad_of_rows=False)
    found = (du, dv, dw) if dw is not None else (du, dv)
    for output, truth, naive in zip(found, truths, naives, strict=False):
        assert_accurate(output, truth, naive, gradient=True)
    assert largest.elements < n * k


def test_without_ranks_the_sums_are_of_w() -> None:
    u, v = torch.empty(5, 0, device=DEVICE), torch.empty(40, 0, device=DEVICE)
    w, sums, dw = signs(5, 40, dtype=torch.float32), nan(5), nan(5, 40)
    abs_row_sums.row_sums(GPU, sums, u, v, w)
    assert_exact(sums, torch.full_like(sums, 40))
    grad = torch.full((5,), 2.0, device=DEVICE)
    abs_row_sums.factor_gradient(GPU, None, dw, grad, u, v, w, grad_of_rows=True)
    assert_exact(dw, 2 * w)


@pytest.mark.parametrize("rank", [1, 16, 17, 64, 65, 1000])
@pytest.mark.parametrize("half", [True, False], ids=["half", "float32"])
def test_every_rank_has_a_tile(rank: int, half: bool) -> None:
    for tiles in (_plan.NORM_TILES, _plan.SUMS_TILES):
        tile = _plan.tile_of(tiles, rank, half)
        assert tile.rank >= 16
        assert tile.rank & (tile.rank - 1) == 0
        assert tile.rank <= tiles[half][2]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100_000])
@pytest.mark.parametrize("programs", [1, 7, 10_000])
def test_parts_cover_what_is_reduced(length: int, programs: int) -> None:
    splits, part = _plan.parts_of(length, 64, programs, GPU)
    assert part % 64 == 0
    assert (splits - 1) * part < length <= splits * part
