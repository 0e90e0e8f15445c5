"""Several projections and several adapters on the CPU: at every level, what lora_linear gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pyfastft import _native
from pyfastft._op import REGISTRY, backend
from pyfastft.native._packing import pack
from pyfastft.testing.samples import PRECISIONS, Precision, samples, upcast
from pyfastft.testing.tolerance import assert_accurate, assert_exact

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=_native.why_no_cpu() or "the library is there"
)
FLOAT32, BFLOAT16 = PRECISIONS[:2]
CPU = torch.device("cpu")
OPS = (
    "lora_projections",
    "lora_projections_backward",
    "lora_adapters",
    "lora_adapters_backward",
    "dora_norm",
    "scale_columns",
    "scale_columns_backward",
    "abs_row_sums",
    "abs_row_sums_backward",
)


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
    torch.set_num_threads(1)


def flat(values: Any) -> list[torch.Tensor]:
    values = values if isinstance(values, tuple) else (values,)
    return [one for v in values for one in (v if isinstance(v, list) else (v,))]


def run(op: str, args: tuple[Any, ...], name: str = "cpu") -> list[torch.Tensor]:
    with backend(name):
        return flat(REGISTRY[op](*args))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_every_sample_at_every_level(level: str, op: str, precision: Precision) -> None:
    for sample in samples(op):
        args = sample.build(precision, CPU)
        actual, naive = run(op, args), run(op, args, "reference")
        truth = run(op, upcast(args), "reference")
        for i, (a, t, n) in enumerate(zip(actual, truth, naive, strict=True)):
            what = f"output {i} of {sample}"
            assert_accurate(a, t, n, gradient=op.endswith("_backward"), what=what)


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_threads(op: str, precision: Precision) -> None:
    for sample in samples(op):
        args = sample.build(precision, CPU)
        torch.set_num_threads(1)
        first = run(op, args)
        for threads in (2, 3, 2):
            torch.set_num_threads(threads)
            for expected, actual in zip(first, run(op, args), strict=True):
                assert_exact(actual, expected, f"{sample} on {threads} threads")


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def adapters_arguments(m: int, n: int, k: int, lengths: list[int], ranks: list[int], p: float):
    count = len(lengths)
    return (
        draw(m, k),
        draw(n, k, scale=k**-0.5),
        [draw(r, k, scale=k**-0.5) for r in ranks],
        [draw(n, r, scale=r**-0.5) for r in ranks],
        draw(n),
        [torch.tensor(0.5 + j) for j in range(count)],
        [p] * count,
        lengths,
        torch.tensor([5, 9]),
        None,
        None,
    )


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_more_adapters_than_one_product_takes(level: str, p: float) -> None:
    """Parts of the rows by themselves, with rows of the base alone behind them."""
    lengths = [1 + j % 3 for j in range(70)]
    args = adapters_arguments(150, 40, 30, lengths, [1 + j % 4 for j in range(70)], p)
    x, weight, a, b, _, s, p_each, _, rng, *_ = args
    with backend("reference"):
        xas = REGISTRY["lora_adapters"](*args)[1]
    need = [True] * (3 + 3 * 70)
    gradients = (draw(150, 40), x, weight, a, b, xas, s, p_each, lengths, rng, None, None, need)
    for op, operands in (("lora_adapters", args), ("lora_adapters_backward", gradients)):
        with backend("cpu"):
            actual = REGISTRY[op](*operands)
        with backend("reference"):
            naive, truth = REGISTRY[op](*operands), REGISTRY[op](*upcast(operands))
        for group in zip(actual, truth, naive, strict=True):
            # Each list as one output: the largest naive error of 70 is no matter of luck.
            joined = (torch.cat([t.reshape(-1) for t in flat((one,))]) for one in group)
            assert_accurate(*joined, gradient=op.endswith("_backward"))


def test_an_adapter_gone_wrong_stays_in_its_rows(level: str) -> None:
    args = list(adapters_arguments(40, 20, 24, [7, 9, 11], [3, 2, 4], 0.3))
    clean = run("lora_adapters", tuple(args))[0]
    args[3] = [args[3][0], torch.full((20, 2), torch.nan), args[3][2]]
    y = run("lora_adapters", tuple(args))[0]
    assert y[7:16].isnan().all()
    assert_exact(torch.cat((y[:7], y[16:])), torch.cat((clean[:7], clean[16:])))


@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
def test_packed_weights_of_lists_give_the_same_bits(level: str, precision: Precision) -> None:
    for op, at in (("lora_projections", 1), ("lora_adapters", 1)):
        sample = next(samples(op))
        args = list(sample.build(precision, CPU))
        weights = args[at] if isinstance(args[at], list) else [args[at]]
        packed = [pack(w) for w in weights]
        packed_dx = [pack(w, transposed=True) for w in weights]
        single = not isinstance(args[at], list)
        forms = (packed[0], packed_dx[0]) if single else (packed, packed_dx)
        plain = run(op, tuple(args))
        for expected, actual in zip(plain, run(op, (*args[:-2], *forms)), strict=True):
            assert_exact(actual, expected)
        sample = next(samples(f"{op}_backward"))
        args = list(sample.build(precision, CPU))
        plain = run(f"{op}_backward", tuple(args))
        with_packed = (*args[:-3], *forms, args[-1])
        for expected, actual in zip(plain, run(f"{op}_backward", with_packed), strict=True):
            assert_exact(actual, expected)


def test_another_packed_weight_among_several_is_refused() -> None:
    args = list(next(samples("lora_projections")).build(FLOAT32, CPU))
    args[-2] = [pack(args[1][0]), pack(args[1][0])]
    with pytest.raises(ValueError, match="lora_projections: expected packed of this weight"):
        run("lora_projections", tuple(args))


def test_seventeen_projections_are_the_references() -> None:
    sample = next(samples("lora_projections_backward"))
    args = list(sample.build(FLOAT32, CPU))
    for at in (0, 2, 3, 4, 5, 6, 7):
        args[at] = [args[at][0]] * 17
    args[-1] = [True] + args[-1][1:6] * 17
    explanation = REGISTRY["lora_projections_backward"].explain(*args)
    assert explanation.chosen == "reference"
    assert "17 projections are more than 16" in explanation.reasons["cpu"]


@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
def test_strides_of_sums(level: str, layout: str, precision: Precision) -> None:
    n, k, r = 37, 70, 5
    dtype = precision.base

    def laid_out(t: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return t.T.contiguous().T
        wide = torch.full((2 * t.shape[0], 3 * t.shape[1]), torch.nan, dtype=t.dtype)
        wide[::2, ::3] = t
        return wide[::2, ::3]

    u, v = torch.randint(-2, 3, (n, r)).to(dtype), torch.randint(-2, 3, (k, r)).to(dtype)
    w = torch.randint(-3, 4, (n, k)).to(dtype) + 0.5
    grad = 0.5 + torch.rand(n)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("abs_row_sums", (u, v, w)),
        ("abs_row_sums_backward", (grad, u, v, w, [True] * 3)),
        ("scale_columns", (w, grad.new_ones(k) * 1.5, None)),
        ("scale_columns_backward", (w, w.abs(), grad.new_ones(k) * 1.5, [True] * 3)),
        ("dora_norm", (w, draw(r, k, dtype=dtype), draw(n, r, dtype=dtype), torch.ones(()), None)),
    ]
    for op, args in cases:
        strided = tuple(
            laid_out(a) if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in args
        )
        for expected, actual in zip(run(op, args), run(op, strided), strict=True):
            assert_exact(actual, expected, op)


@pytest.mark.parametrize("size", [(2049, 33, 3), (230, 4100, 2), (1, 1, 1)])
def test_sums_larger_than_their_tiles(level: str, size: tuple[int, int, int]) -> None:
    n, k, r = size
    u, v = torch.randint(-2, 3, (n, r)).float(), torch.randint(-2, 3, (k, r)).float()
    w = torch.randint(-3, 4, (n, k)).float() + 0.5
    grad = torch.randint(1, 4, (n,)).float()
    difference = u @ v.T - w
    (sums,) = run("abs_row_sums", (u, v, w))
    assert_exact(sums, difference.abs().sum(1))
    du, dv, dw = run("abs_row_sums_backward", (grad, u, v, w, [True] * 3))
    z = difference.sign() * grad[:, None]
    assert_exact(du, z @ v)
    assert_exact(dv, z.T @ u)
    assert_exact(dw, -z)
