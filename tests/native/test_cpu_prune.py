"""The CPU kernels of the prune family: every level of the instruction set, tile edges, threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pyfastft import _native
from pyfastft._op import REGISTRY, backend
from pyfastft.ops.prune._pattern import grid_of, index_of_mask
from pyfastft.testing.samples import PRECISIONS, Precision, flat, samples, upcast
from pyfastft.testing.tolerance import assert_accurate, assert_exact

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=_native.why_no_cpu() or "the library is there"
)

CPU = torch.device("cpu")
OPS = ("block_sparse_linear", "block_sparse_linear_backward")


def levels() -> list[str]:
    if _native.why_no_cpu() is not None:
        return []
    return list(_native.ISA_LEVELS[: _native.cpu().isa()[0] + 1])


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with _native.cpu_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """Threads change no bit, which has its own test; waking them costs most of these."""
    torch.set_num_threads(1)


def run(op: str, args: tuple[Any, ...], name: str = "cpu") -> tuple[torch.Tensor, ...]:
    with backend(name):
        return flat(REGISTRY[op](*args))


def check(op: str, args: tuple[Any, ...], what: str) -> None:
    actual, naive = run(op, args), run(op, args, "reference")
    truth = run(op, upcast(args), "reference")
    gradient = op.endswith("_backward")
    for a, t, n in zip(actual, truth, naive, strict=True):
        assert_accurate(a, t, n, gradient=gradient, what=what)


@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_level_agrees_with_the_reference(op: str, precision: Precision, level: str) -> None:
    for sample in samples(op):
        check(op, sample.build(precision, CPU), str(sample))


def layer(
    m: int, n: int, k: int, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of both ops, half of the blocks there."""
    torch.manual_seed(m + n + k)
    index = index_of_mask(torch.rand(grid_of(n, k, *block)) < 0.5)
    blocks = (index.shape[0] - 2 * (sum(grid_of(n, k, *block)) + 1)) // 3
    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    values = torch.randn(blocks, *block).to(dtype)
    bias = torch.randn(n).to(dtype)
    return (x, values, bias, index, n), (grad, x, values, index, k, [True] * 3)


@pytest.mark.parametrize("block", [(16, 16), (24, 40), (128, 32), (1, 9)], ids=str)
def test_rows_of_every_kind(block: tuple[int, int], level: str) -> None:
    """Few tokens, as many as a tile has, one more, and several tiles."""
    for m in (1, 2, 4, 5, 14, 15, 43):
        for op, args in zip(OPS, layer(m, 130, 90, block), strict=True):
            check(op, args, f"{op} of {m} tokens")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_tokens_are_added_up_in_parts(dtype: torch.dtype) -> None:
    _, args = layer(2100, 40, 50, (16, 16), dtype)
    check(OPS[1], args, str(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 40, 300])
def test_threads_change_no_bit(m: int, dtype: torch.dtype) -> None:
    calls = list(zip(OPS, layer(m, 500, 700, (32, 64), dtype), strict=True))
    alone = [run(op, args) for op, args in calls]
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for (op, args), one in zip(calls, alone, strict=True):
            for a, e in zip(run(op, args), one, strict=True):
                assert_exact(a, e, f"{op} on {threads} threads")
