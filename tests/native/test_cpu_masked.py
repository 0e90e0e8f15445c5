"""The CPU kernels of the masked family: every level of the instruction set, tile edges, threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pyfastft import _native
from pyfastft._op import REGISTRY, backend
from pyfastft.ops.masked.select import PAIRED, SCORES
from pyfastft.testing.samples import FLOAT32, PRECISIONS, Precision, samples, upcast
from pyfastft.testing.tolerance import assert_accurate, assert_exact

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=_native.why_no_cpu() or "the library is there"
)

CPU = torch.device("cpu")
STEPS = ("masked_adamw_", "masked_sgd_", "masked_lion_")
HALVES = PRECISIONS[:3]


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
    """The outputs; of an op that mutates, the arguments it wrote into."""
    with backend(name):
        outputs = REGISTRY[op](*args)
    if REGISTRY[op].mutates:
        return tuple(REGISTRY[op].written(args))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def arguments(op: str, sample: str, precision: Precision = FLOAT32) -> tuple[Any, ...]:
    return next(s for s in samples(op) if s.name == sample).build(precision, CPU)


@pytest.mark.parametrize("precision", HALVES, ids=str)
@pytest.mark.parametrize("op", [*STEPS, "masked_gather", "masked_scatter_", "masked_weight_grad"])
def test_every_level_agrees_with_the_reference(op: str, precision: Precision, level: str) -> None:
    for sample in samples(op):
        actual = run(op, sample.build(precision, CPU))
        truth = run(op, upcast(sample.build(precision, CPU)), "reference")
        naive = run(op, sample.build(precision, CPU), "reference")
        gradient = op in (*STEPS, "masked_weight_grad")
        for a, t, n in zip(actual, truth, naive, strict=True):
            assert_accurate(a, t, n, gradient=gradient, what=str(sample))


@pytest.mark.parametrize("precision", HALVES, ids=str)
def test_every_level_selects_the_same(precision: Precision, level: str) -> None:
    for sample in samples("select_topk"):
        actual = run("select_topk", sample.build(precision, CPU))
        expected = run("select_topk", sample.build(precision, CPU), "reference")
        for a, e in zip(actual, expected, strict=True):
            assert_exact(a, e, str(sample))


@pytest.mark.parametrize("score", SCORES)
def test_selection_of_many_at_every_level(score: str, level: str) -> None:
    """Enough elements for a sampled bracket, sizes off the block, tensors that end within one."""
    tensors = [torch.randn(517, 1031), torch.randn(70_001), torch.randn(3)]
    others = []
    if score in PAIRED:
        others = [torch.randn_like(tensor) for tensor in tensors]
    elif score == "wanda":
        others = [torch.rand(1031), torch.rand(70_001), torch.rand(3)]
    exclude = [torch.arange(0, t.numel(), 7) for t in tensors]
    rng = torch.tensor([3, 4]) if score == "random" else None
    for largest in (True, False):
        args = (tensors, others, exclude, 4321, score, largest, rng)
        expected = run("select_topk", args, "reference")
        for a, e in zip(run("select_topk", args), expected, strict=True):
            assert_exact(a, e)


def draw_index(n: int, k: int, rows: int, columns: int, count: int) -> torch.Tensor:
    across = k // columns
    places = torch.randperm(n // rows * across)[:count].sort().values
    return (places // across * rows * k + places % across * columns).int()


# N, K, tokens, rows, columns, count: one beyond, at and below the edges of tiles and of chunks of
# tokens; sets on either side of the choice between dot products and tiles.
GRADS = [
    (33, 47, 257, 1, 1, 60),
    (33, 47, 385, 1, 1, 700),
    (17, 16, 255, 1, 1, 17),
    (64, 31, 769, 1, 1, 1900),
    (225, 40, 13, 1, 40, 101),
    (30, 40, 20, 15, 40, 1),
    (97, 225, 31, 97, 1, 113),
    (40, 60, 50, 40, 20, 2),
    (230, 34, 19, 230, 17, 1),
    (48, 260, 33, 12, 130, 5),
    (16, 4, 9, 4, 1, 7),
]


@pytest.mark.parametrize("precision", HALVES, ids=str)
@pytest.mark.parametrize("case", GRADS, ids=str)
def test_gradients_at_the_edges_of_tiles(
    case: tuple[int, ...], precision: Precision, level: str
) -> None:
    n, k, m, rows, columns, count = case
    grad, x = torch.randn(m, n).to(precision.base), torch.randn(m, k).to(precision.base)
    index = draw_index(n, k, rows, columns, count)
    args = grad, x, index, rows, columns
    (actual,) = run("masked_weight_grad", args)
    (truth,) = run("masked_weight_grad", upcast(args), "reference")
    (naive,) = run("masked_weight_grad", args, "reference")
    assert_accurate(actual, truth, naive, gradient=True)
    turned = (grad.T.contiguous().T, x, index.long(), rows, columns)
    (again,) = run("masked_weight_grad", turned)
    assert_accurate(again, truth, naive, gradient=True)


def work() -> list[tuple[str, tuple[Any, ...]]]:
    """Calls large enough to be cut among threads."""
    torch.manual_seed(2)
    n = k = 192
    grad, x = torch.randn(600, n), torch.randn(600, k)
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for rows, columns, count in ((1, 1, 900), (1, 1, 20_000), (1, k, 40), (n, 1, 40), (32, 32, 9)):
        index = draw_index(n, k, rows, columns, count)
        calls.append(("masked_weight_grad", (grad, x, index, rows, columns)))
    tensors = [torch.randn(900, 1000).round(decimals=2), torch.randn(50)]
    calls.append(("select_topk", (tensors, [], [], 70_000, "magnitude", True, None)))
    index = draw_index(900, 1000, 1, 1, 60_000)
    values = torch.randn(60_000)
    hypers = torch.tensor([[0.1, 0.1, 2, 1, 0.9, 0.99, 1e-8]], dtype=torch.float64)
    state = [[torch.rand(60_000)] for _ in range(3)]
    weight = [torch.randn(900, 1000).bfloat16()]
    rng = torch.tensor([5, 6])
    calls.append(("masked_adamw_", (weight, [values], *state, [index], [1], [1], hypers, rng)))
    calls.append(("masked_scatter_", (torch.randn(900, 1000), values, index, 1, 1, 0.5)))
    calls.append(("masked_gather", (torch.randn(900, 1000), index, 1, 1)))
    return calls


@pytest.mark.more
def test_threads_change_no_bit() -> None:
    for position in range(len(work())):
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(*work()[position]))
        for other in results[1:]:
            for a, e in zip(other, results[0], strict=True):
                assert_exact(a, e, work()[position][0])


def test_stochastic_rounding_is_the_specified_one_bit_for_bit(level: str) -> None:
    """Without decay and momentum the new value is exact on both sides, so the bits must agree."""
    for dtype in (torch.bfloat16, torch.float16):
        start = torch.randn(1000) * 2.0 ** torch.randint(-30, 17, (1000,))
        start[:4] = torch.tensor([float("inf"), float("nan"), 65519.0, 65535.0])
        results = []
        for name in ("cpu", "reference"):
            weight = [torch.zeros(1000, dtype=dtype)]
            values, grads = [start.clone()], [torch.zeros(1000)]
            hypers = torch.tensor([[1.0, 0, 1, 1, 0, 0, 0]], dtype=torch.float64)
            none = [torch.empty(0)]
            index = [torch.arange(1000)]
            args = (weight, values, none, grads, index, [1], [1], hypers, torch.tensor([7, 8]))
            run("masked_sgd_", args, name)
            results.append(weight[0])
        assert_exact(*results)


def test_no_allocation_is_as_large_as_the_whole_gradient() -> None:
    """The tensors that torch allocates during a backward of one layer."""
    n = k = 512
    index = draw_index(n, k, 1, 1, 2000)
    grad, x = torch.randn(64, n), torch.randn(64, k)
    with torch.profiler.profile(profile_memory=True) as profile:
        run("masked_weight_grad", (grad, x, index, 1, 1))
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert largest < n * k * 4


@pytest.mark.more
def test_the_widest_offsets() -> None:
    """Offsets beyond 32 bits, in a weight of which only the touched pages become memory."""
    weight = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    index = torch.tensor([5, weight.numel() - 1])
    run("masked_scatter_", (weight, torch.tensor([1.0, 2.0]), index, 1, 1, None))
    assert run("masked_gather", (weight, index, 1, 1))[0].tolist() == [1.0, 2.0]
    hypers = torch.tensor([[1.0, 0, 1, 1, 0, 0, 0]], dtype=torch.float64)
    none, grads = [torch.empty(0)], [torch.ones(2)]
    args = ([weight], none, none, grads, [index], [1], [1], hypers, None)
    run("masked_sgd_", args)
    assert run("masked_gather", (weight, index, 1, 1))[0].tolist() == [0.0, 1.0]
