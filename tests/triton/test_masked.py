"""The masked family on Triton beyond small samples: edges of tiles, every engine, the reference's
bits where they are promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pyfastft import backend
from pyfastft._op import REGISTRY
from pyfastft.ops.masked.select import PAIRED, SCORES
from pyfastft.testing.samples import FLOAT32, PRECISIONS, Precision, samples, upcast
from pyfastft.testing.tolerance import assert_accurate, assert_exact
from pyfastft.triton_kernels._plan import Device
from pyfastft.triton_kernels.masked import select, weight_grad

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(op: str, args: tuple[Any, ...], name: str) -> tuple[torch.Tensor, ...]:
    with backend(name):
        outputs = REGISTRY[op](*args)
    if REGISTRY[op].mutates:
        return tuple(REGISTRY[op].written(args))
    return outputs if isinstance(outputs, tuple) else (outputs,)


# N, K, tokens, rows, columns, count, and which kernel takes them.
GRADS = [
    (65, 131, 70, 1, 1, 300, "entries"),
    (65, 131, 70, 1, 1, 900, "elements"),
    (130, 33, 257, 1, 1, 4290, "elements"),
    (70, 140, 130, 1, 140, 67, "rows"),
    (60, 40, 20, 15, 40, 3, "rows"),
    (140, 70, 33, 140, 1, 65, "columns"),
    (130, 34, 19, 130, 17, 1, "blocks"),
    (66, 260, 65, 33, 130, 3, "blocks"),
    (1, 90, 40, 1, 1, 11, "columns"),
]


@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
@pytest.mark.parametrize("case", GRADS, ids=str)
def test_gradients_at_the_edges_of_tiles(case: tuple[Any, ...], precision: Precision) -> None:
    n, k, m, rows, columns, count, way = case
    half = precision.base is not torch.float32
    if way != "entries" or not half:
        assert weight_grad.way_of(count, rows, columns, n, k, half=half) == way
    across = k // columns
    places = torch.randperm(n // rows * across)[:count].sort().values
    index = places // across * rows * k + places % across * columns
    grad = torch.randn(n, m).T.to(DEVICE, precision.base)
    x = torch.randn(m, k).to(DEVICE, precision.base)
    args = grad, x, index.to(DEVICE), rows, columns
    (actual,) = run("masked_weight_grad", args, "triton")
    (truth,) = run("masked_weight_grad", upcast(args), "reference")
    (naive,) = run("masked_weight_grad", args, "reference")
    assert_accurate(actual, truth, naive, gradient=True)


def test_tokens_are_cut_where_tiles_fill_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Device(multiprocessors=40, capability=(9, 0))
    monkeypatch.setattr(weight_grad, "device_of", lambda tensor: many)
    grad, x = torch.randn(300, 20, device=DEVICE), torch.randn(300, 30, device=DEVICE)
    for index, columns in ((torch.arange(0, 600, 2), 1), (torch.tensor([30, 90]), 30)):
        args = grad, x, index.to(DEVICE), 1, columns
        (actual,) = run("masked_weight_grad", args, "triton")
        (truth,) = run("masked_weight_grad", upcast(args), "reference")
        (naive,) = run("masked_weight_grad", args, "reference")
        assert_accurate(actual, truth, naive, gradient=True)


@pytest.mark.parametrize("op", ["masked_adamw_", "masked_sgd_", "masked_lion_"])
def test_large_steps(op: str) -> None:
    sample = next(one for one in samples(op) if one.large)
    for precision in PRECISIONS[:2]:
        actual = run(op, sample.build(precision, DEVICE), "triton")
        truth = run(op, upcast(sample.build(precision, DEVICE)), "reference")
        naive = run(op, sample.build(precision, DEVICE), "reference")
        for a, t, n in zip(actual, truth, naive, strict=True):
            assert_accurate(a, t, n, gradient=True)


def test_weights_of_several_kinds_step_together() -> None:
    kinds = ((torch.float32, torch.int32), (torch.bfloat16, torch.int64), (torch.float32,) * 2)
    torch.manual_seed(3)
    start = [torch.randn(9, 40).to(DEVICE, kind) for kind, _ in kinds]
    results = []
    for name in ("triton", "reference"):
        weights = [one.clone() for one in start]
        index = [torch.arange(0, 360, 7 + i, device=DEVICE) for i in range(3)]
        index[0] = index[0].int()
        grads = [torch.linspace(-1, 1, len(one), device=DEVICE) for one in index]
        values = [w.view(-1)[i.long()].float() for w, i in zip(weights, index, strict=True)]
        values[2] = values[2][:0]
        none = [grad[:0] for grad in grads]
        hypers = torch.tensor([[0.5, 0, 1, 1, 0, 0, 0]] * 3, dtype=torch.float64)
        args = (weights, values, none, grads, index, [1] * 3, [1] * 3, hypers, None)
        results.append(run("masked_sgd_", args, name))
    for a, e in zip(*results, strict=True):
        assert_exact(a, e)


def test_stochastic_rounding_is_the_specified_one_bit_for_bit() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        start = torch.randn(1000) * 2.0 ** torch.randint(-30, 17, (1000,))
        start[:4] = torch.tensor([float("inf"), float("nan"), 65519.0, 65535.0])
        results = []
        for name in ("triton", "reference"):
            weight = [torch.zeros(1000, dtype=dtype, device=DEVICE)]
            values, grads = [start.to(DEVICE)], [torch.zeros(1000, device=DEVICE)]
            hypers = torch.tensor([[1.0, 0, 1, 1, 0, 0, 0]], dtype=torch.float64)
            none, index = [grads[0][:0]], [torch.arange(1000, device=DEVICE)]
            args = (weight, values, none, grads, index, [1], [1], hypers, torch.tensor([7, 8]))
            run("masked_sgd_", args, name)
            results.append(weight[0])
        assert_exact(*results)


@pytest.mark.parametrize("score", SCORES)
def test_selection_over_several_chunks(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of several dtypes that end within a chunk, ties, and entries left out."""
    monkeypatch.setattr(select, "_CHUNK", 512)
    monkeypatch.setattr(select, "_TILE", 256)
    sizes = ((30, 41), (1001,), (3,))
    tensors = [torch.randn(size, device=DEVICE).round(decimals=1) for size in sizes]
    others = [torch.randn_like(one) for one in tensors] if score in PAIRED else []
    if score == "wanda":
        others = [torch.rand(size[-1], device=DEVICE) for size in sizes]
    else:
        tensors[1] = tensors[1].bfloat16()
        if others:
            others[1] = others[1].bfloat16()
    exclude = [torch.arange(0, one.numel(), 7, device=DEVICE) for one in tensors]
    rng = torch.tensor([3, 4], device=DEVICE) if score == "random" else None
    for largest in (True, False):
        args = (tensors, others, exclude, 432, score, largest, rng)
        expected = run("select_topk", args, "reference")
        for a, e in zip(run("select_topk", args, "triton"), expected, strict=True):
            assert_exact(a, e, score)


@pytest.mark.parametrize("offsets", [[3, 1], [3, 3], [-1, 3], [3, 24]])
def test_a_hostile_index_is_refused_before_anything_is_written(offsets: list[int]) -> None:
    weight, index = torch.randn(4, 6, device=DEVICE), torch.tensor(offsets, device=DEVICE)
    before, ones = weight.clone(), torch.ones(2, device=DEVICE)
    hypers = torch.tensor([[0.1, 0, 1, 1, 0.9, 0.99, 0]], dtype=torch.float64)
    step = ([weight], [ones], [ones], [ones], [index], [1], [1], hypers, None)
    for op, args in (
        ("masked_scatter_", (weight, ones, index, 1, 1, None)),
        ("masked_lion_", step),
    ):
        with pytest.raises(ValueError, match=f"{op}: expected index of"):
            run(op, args, "triton")
    assert_exact(weight, before)


def test_an_index_that_changed_is_read_again() -> None:
    weight, index = torch.randn(4, 6, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    run("masked_gather", (weight, index, 1, 1), "triton")
    index[1] = 30
    with pytest.raises(ValueError, match="masked_gather: expected index of offsets within 24"):
        run("masked_gather", (weight, index, 1, 1), "triton")


def test_lists_that_cannot_be_merged() -> None:
    index = torch.tensor([2, 5, 9], device=DEVICE)
    for kept, grown in (([1, 0], []), ([3], []), ([-1], []), ([0], [2]), ([], [5, 4])):
        lists = [torch.tensor(one, dtype=torch.int64, device=DEVICE) for one in (kept, grown)]
        with pytest.raises(ValueError, match=r"masked_merge: expected (kept|grown)"):
            run("masked_merge", (index, *lists), "triton")


def test_float64_is_left_to_the_reference() -> None:
    args = next(samples("masked_gather")).build(FLOAT32, DEVICE)
    with backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        REGISTRY["masked_gather"](*upcast(args))
