"""The CUDA kernels of the masked family on the CPU, compiled by g++ against
``simt/cuda_runtime.h``. Through the adapter every sample gives what the reference gives; so do
calls of the ABI under AddressSanitizer and UndefinedBehaviorSanitizer, and ThreadSanitizer finds no
race in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pyfastft import _native
from pyfastft._native import DTYPES
from pyfastft._op import REGISTRY
from pyfastft.native.masked.select import SCORED
from pyfastft.native.masked.step import METHODS, SEGMENT
from pyfastft.ops.masked._rectangles import matrix_of
from pyfastft.ops.masked.select import SCORES
from pyfastft.testing.samples import FLOAT32, PRECISIONS, Precision, Sample, samples, upcast
from pyfastft.testing.tolerance import assert_accurate, assert_exact

if TYPE_CHECKING:
    from conftest import Kernels

CPU = torch.device("cpu")
OPS = (*METHODS, "select_topk")
BF16, FP16 = PRECISIONS[1:3]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")


def outputs(op: str, args: tuple[Any, ...], launch: Callable[..., None]) -> list[torch.Tensor]:
    """What a launch returns, or what it wrote into its arguments."""
    made = REGISTRY[op].contract(*args)
    if made is None:
        launch(*args)
        return list(REGISTRY[op].written(args))
    for one in made:
        one.fill_(-1)
    launch(*made, *args)
    return list(made)


def check(op: str, build: Callable[[], tuple[Any, ...]], launch: Callable[..., None]) -> None:
    """A launch against the reference: what is selected bit for bit, a step as accurate."""
    reference = REGISTRY[op].impl("reference").launch
    actual, naive = outputs(op, build(), launch), outputs(op, build(), reference)
    if op == "select_topk":
        for a, n in zip(actual, naive, strict=True):
            assert_exact(a, n)
        return
    truth = outputs(op, upcast(build()), reference)
    for i, (a, t, n) in enumerate(zip(actual, truth, naive, strict=True)):
        assert_accurate(a, t, n, gradient=True, what=f"output {i}")


def runs() -> Iterator[object]:
    for op in OPS:
        for sample in samples(op):
            for precision in (FLOAT32, BF16, FP16):
                few = precision is BF16 and not sample.large and "smallest" not in sample.name
                marks = () if few else pytest.mark.slow
                yield pytest.param(sample, precision, id=f"{op}-{sample}-{precision}", marks=marks)


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize(("sample", "precision"), list(runs()))
def test_every_sample(sample: Sample, precision: Precision) -> None:
    launch = REGISTRY[sample.op].impl("cuda").launch
    check(sample.op, lambda: sample.build(precision, CPU), launch)


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("op", METHODS)
def test_weights_of_all_dtypes_in_one_launch(op: str) -> None:
    """Segments of every dtype and of both index dtypes, more values than a block has."""

    def build() -> tuple[Any, ...]:
        torch.manual_seed(3)
        weights = [torch.randn(60, 50).to(p.base) for p in (FLOAT32, BF16, FP16)]
        index = [torch.arange(5, 3000, 2), torch.arange(0, 3000, 500), torch.arange(3).int()]
        rows, columns = [1, 10, 60], [1, 50, 1]
        counts = [len(i) * r * c for i, r, c in zip(index, rows, columns, strict=True)]
        values = [torch.randn(counts[0]), torch.empty(0), torch.randn(counts[2])]
        lists = [[torch.rand(count) for count in counts] for _ in range(3)]
        states, grads = lists[: 2 if op == "masked_adamw_" else 1], lists[2]
        hypers = torch.tensor([[0.1, 0.1, 2, 1, 0.9, 0.5, 1e-3]] * 3, dtype=torch.float64)
        rng = torch.tensor([3, -4])
        return weights, values, *states, grads, index, rows, columns, hypers, rng

    check(op, build, REGISTRY[op].impl("cuda").launch)


@pytest.mark.usefixtures("adapter")
def test_stochastic_rounding_is_the_specified_one_bit_for_bit() -> None:
    """Without decay and momentum the new value is exact on both sides, so the bits must agree."""
    for dtype in (torch.bfloat16, torch.float16):
        start = torch.randn(1000) * 2.0 ** torch.randint(-30, 17, (1000,))
        start[:4] = torch.tensor([float("inf"), float("nan"), 65519.0, 65535.0])
        results = []
        for name in ("cuda", "reference"):
            weights = [torch.zeros(1, dtype=dtype), torch.zeros(1000, dtype=dtype)]
            values, grads = [torch.ones(1), start.clone()], [torch.zeros(1), torch.zeros(1000)]
            hypers = torch.tensor([[1.0, 0, 1, 1, 0, 0, 0]] * 2, dtype=torch.float64)
            none, index = [torch.empty(0)] * 2, [torch.arange(1), torch.arange(1000)]
            ones, rng = [1, 1], torch.tensor([7, 8])
            args = (weights, values, none, grads, index, ones, ones, hypers, rng)
            REGISTRY["masked_sgd_"].impl(name).launch(*args)
            results.append(weights[1])
        assert_exact(*results)


@pytest.mark.usefixtures("adapter")
def test_selection_of_several_chunks() -> None:
    """Tensors of several chunks, ties across them, an excluded stretch longer than a chunk."""
    tensors = [torch.randn(70_001).round(decimals=1), torch.empty(0), torch.randn(40_000).half()]
    tensors[0][::1000] = torch.nan
    exclude = [torch.arange(10, 40_000), torch.arange(0), torch.arange(0, 40_000, 3).int()]
    for k, largest in ((30_000, False), (56_676, True)):
        args = (tensors, [], exclude, k, "value", largest, None)
        check("select_topk", lambda args=args: args, REGISTRY["select_topk"].impl("cuda").launch)


@pytest.mark.usefixtures("adapter")
def test_a_hostile_index_is_refused_before_anything_is_written() -> None:
    weight, one = torch.zeros(4, 6), torch.ones(2)
    hypers = torch.tensor([[0.1, 0, 1, 1, 0.9, 0.99, 1e-8]], dtype=torch.float64)
    for offsets, says in (([3, 1], "ascending"), ([-1, 3], "within"), ([3, 24], "within")):
        index = torch.tensor(offsets)
        args = ([weight], [one], [one], [one], [index], [1], [1], hypers, None)
        with pytest.raises(ValueError, match=f"masked_lion_: expected index of .*{says}"):
            REGISTRY["masked_lion_"].impl("cuda").launch(*args)
        with pytest.raises(ValueError, match=f"select_topk: expected exclude of .*{says}"):
            outputs(
                "select_topk",
                ([weight], [], [index], 2, "value", True, None),
                REGISTRY["select_topk"].impl("cuda").launch,
            )
    assert not weight.any()
    assert bool((one == 1).all())


@pytest.mark.parametrize("name", OPS)
def test_reasons_without_a_gpu(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    op = REGISTRY[name]
    args = next(samples(name)).build(FLOAT32, CPU)
    assert op.impl("cuda").unsupported(*args) == _native.why_no_cuda() is not None
    assert "float64 is not one of" in op.impl("cuda").unsupported(*upcast(args))


# -- the ABI under the sanitizers ------------------------------------------------------------------


class Caller:
    """Launches the ops in the process of ``kernels``, as the adapters do in this one."""

    def __init__(self, kernels: Kernels, **changed: int) -> None:
        self.kernels, self.changed = kernels, changed

    def segments(self, states: int, *args: Any) -> list[Any]:
        weights, values, own = args[0], args[1], args[2 : 2 + states]
        grads, index, rows, columns = args[2 + states : 6 + states]
        table: list[Any] = []
        for i, weight in enumerate(weights):
            fields = {
                "weight": weight,
                "value": values[i] if values[i].numel() else None,
                **dict.fromkeys(("first", "second")),
                **{
                    name: one[i] if one[i].numel() else None
                    for name, one in zip(("first", "second"), own, strict=False)
                },
                "grad": grads[i],
                "index": index[i],
                "count": index[i].shape[0],
                "rows": rows[i],
                "columns": columns[i],
                "stride": matrix_of(weight)[1],
                "size": weight.numel(),
                "dtype": DTYPES[weight.dtype],
                "index_bytes": index[i].element_size(),
            }
            table += [{**fields, **self.changed}[name] for name in SEGMENT]
        return table

    def step(self, op: str, *args: Any) -> None:
        segments = self.segments(2 if op == "masked_adamw_" else 1, *args)
        count, hypers, rng = len(args[0]), args[-2], args[-1]
        starts = torch.full((count + 1, 2), -1)
        factors = torch.full((count, 8), torch.nan)
        shared = {"segments": segments, "starts": starts, "factors": factors, "count": count}
        method = METHODS.index(op)
        self.kernels.call("masked_step_plan", hypers=hypers, method=method, **shared)
        blocks = int(starts[-1, 0])
        self.kernels.call(
            "masked_step", rng=rng, blocks=blocks, method=method, stream=None, **shared
        )

    def select(
        self,
        index: torch.Tensor,
        counts: torch.Tensor,
        tensors: list[torch.Tensor],
        others: list[torch.Tensor],
        exclude: list[torch.Tensor],
        k: int,
        score: str,
        largest: bool,
        rng: torch.Tensor | None,
    ) -> None:
        table: list[Any] = []
        for i, tensor in enumerate(tensors):
            fields = {
                "a": tensor,
                "b": others[i] if others else None,
                "exclude": exclude[i] if exclude else None,
                "size": tensor.numel(),
                "columns": max(matrix_of(tensor)[1], 1),
                "excluded": exclude[i].numel() if exclude else 0,
                "exclude_bytes": exclude[i].element_size() if exclude else 8,
                "dtype": DTYPES[tensor.dtype],
            }
            table += [{**fields, **self.changed}[name] for name in SCORED]
        count = len(tensors)
        starts, words = torch.full((count + 1, 2), -1), torch.full((1,), -1)
        shared = {"tensors": table, "starts": starts, "count": count}
        self.kernels.call("select_topk_plan", words=words, **shared)
        self.kernels.call(
            "select_topk",
            index=index,
            counts=counts,
            workspace=torch.zeros(int(words), dtype=torch.int64),
            rng=rng,
            words=int(words),
            blocks=int(starts[-1, 0]),
            k=k,
            score=SCORES.index(score),
            largest=int(largest),
            stream=None,
            **shared,
        )

    def launch(self, op: str) -> Callable[..., None]:
        if op == "select_topk":
            return self.select
        return lambda *args: self.step(op, *args)


@dataclass(frozen=True)
class Case:
    """A sample of an op."""

    op: str
    name: str
    precision: Precision = BF16

    def __str__(self) -> str:
        return f"{self.op}-{self.name}-{self.precision}"

    def build(self) -> tuple[Any, ...]:
        sample = next(s for s in samples(self.op) if s.name == self.name)
        return sample.build(self.precision, CPU)


CASES = (
    Case("masked_adamw_", "stochastic"),
    Case("masked_adamw_", "in-place", FP16),
    Case("masked_sgd_", "no-momentum"),
    Case("masked_lion_", "masters", FLOAT32),
    Case("select_topk", "exclude"),
    Case("select_topk", "wanda"),
    Case("select_topk", "random"),
    Case("select_topk", "an-empty-tensor", FP16),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_sanitizer_objects(kernels: Kernels, case: Case) -> None:
    check(case.op, case.build, Caller(kernels).launch(case.op))


def test_nothing_is_written_behind_the_last_of_equals(kernels: Kernels) -> None:
    args = ([torch.zeros(300)], [], [], 7, "value", True, None)
    check("select_topk", lambda: args, Caller(kernels).launch("select_topk"))


@pytest.mark.parametrize(
    ("case", "changed", "message"),
    [
        (CASES[0], {"dtype": 7}, "masked_step: unknown dtype code 7"),
        (CASES[0], {"second": None}, "masked_step: a segment without second moment"),
        (CASES[3], {"index_bytes": 2}, "masked_step: index of 2 bytes"),
        (CASES[3], {"stride": 0}, "masked_step: rectangles of 1 x 1 do not tile rows of 0"),
        (CASES[4], {"dtype": 3}, "select_topk: unknown dtype code 3"),
        (CASES[4], {"columns": 0}, "select_topk: 35 elements in rows of 0"),
    ],
    ids=str,
)
def test_what_the_adapter_may_not_ask_for(
    kernels: Kernels, case: Case, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        check(case.op, case.build, Caller(kernels, **changed).launch(case.op))


def test_an_access_out_of_bounds_is_found(fresh_kernels: Kernels) -> None:
    case = Case("masked_lion_", "masters", FLOAT32)
    args = case.build()
    args[3][0] = args[3][0][:-1].clone()
    with pytest.raises(ChildProcessError, match="heap-buffer-overflow"):
        Caller(fresh_kernels).launch(case.op)(*args)


@pytest.mark.parametrize(
    "case", [CASES[0], pytest.param(CASES[4], marks=pytest.mark.more)], ids=str
)
def test_no_races(racing: Callable[[int], Kernels], case: Case) -> None:
    check(case.op, case.build, Caller(racing(0)).launch(case.op))


# Of the step: the segment that one thread finds. Of the selection, whose kernels each count their
# own: the tensor found, the bits cleared and set, the digits counted; a scan's groups.
BARRIERS = [
    pytest.param(CASES[0], 1, marks=pytest.mark.more),
    pytest.param(CASES[4], 1, marks=pytest.mark.more),
    *(pytest.param(CASES[4], barrier, marks=pytest.mark.slow) for barrier in range(2, 7)),
]


@pytest.mark.parametrize(("case", "barrier"), BARRIERS, ids=str)
def test_a_removed_barrier_is_a_race(
    racing: Callable[[int], Kernels], case: Case, barrier: int
) -> None:
    args = case.build()
    with pytest.raises(ChildProcessError, match="ThreadSanitizer: data race"):
        outputs(case.op, args, Caller(racing(barrier)).launch(case.op))
