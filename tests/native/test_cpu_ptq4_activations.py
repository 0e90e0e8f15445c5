"""Products of 4-bit weights with quantized activations, and int8 weights, on the CPU library: the
reference's bits at every level of the instruction set, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pyfastft import _native, backend
from pyfastft._native import DTYPES
from pyfastft._op import REGISTRY
from pyfastft.testing.samples import FLOAT32, PRECISIONS, Sample, samples, upcast
from pyfastft.testing.tolerance import assert_accurate, assert_exact

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=str(_native.why_no_cpu() or "")
)

CPU = torch.device("cpu")
LEVELS = _native.ISA_LEVELS if _native.why_no_cpu() is None else ()
EXACT = ("int4_linear_a8", "int4_linear_a4", "fake_quantize4")
ACCURATE = ("int8_linear", "int8_linear_backward", "fake_quantize4_backward")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    if LEVELS.index(request.param) > _native.cpu().isa()[0]:
        pytest.skip(f"{request.param} does not run here")
    with _native.cpu_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    """Threads change no bit, which has its own test; waking them costs most of these."""
    torch.set_num_threads(1)


def of(*ops: str) -> list[Sample]:
    return [sample for op in ops for sample in samples(op)]


def run(sample: Sample, args: tuple, name: str) -> tuple[torch.Tensor, ...]:
    with backend(name):
        outputs = REGISTRY[sample.op](*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("sample", of(*EXACT), ids=lambda s: f"{s.op}-{s}")
def test_the_reference_bits(level: str, sample: Sample) -> None:
    for precision in PRECISIONS[:3]:
        args = sample.build(precision, CPU)
        actual, expected = (run(sample, args, name)[0] for name in ("cpu", "reference"))
        assert_exact(actual, expected, f"output in {precision}")


@pytest.mark.parametrize("sample", of(*ACCURATE), ids=lambda s: f"{s.op}-{s}")
def test_accurate(level: str, sample: Sample) -> None:
    for precision in PRECISIONS[:3]:
        args = sample.build(precision, CPU)
        actual, naive = (run(sample, args, name) for name in ("cpu", "reference"))
        truth = run(sample, upcast(args), "reference")
        for a, t, n in zip(actual, truth, naive, strict=True):
            gradient = sample.op.endswith("_backward")
            assert_accurate(a, t, n, gradient=gradient, what=f"output in {precision}")


# Rows at, below and above the heights of tiles; columns of strips; groups of whole words of codes
# and of none.
@pytest.mark.parametrize(("n", "k", "group"), [(1, 8, 8), (33, 128, 32), (70, 97, 12), (31, 65, 7)])
@pytest.mark.parametrize("op", ["int4_linear_a8", "int4_linear_a4"])
def test_edges_of_tiles(level: str, op: str, n: int, k: int, group: int) -> None:
    for m in (1, 2, 3, 5, 13, 14, 15, 29, 57):
        args = operands(op, m, n, k, group)
        with backend("reference"):
            expected = REGISTRY[op](*args)
        assert_exact(REGISTRY[op](*args), expected, f"y of {m} rows")


def operands(op: str, m: int, n: int, k: int, group: int) -> tuple:
    codes = torch.randint(256, (n, -(-k // 2)), dtype=torch.uint8)
    groups = -(-k // group)
    scale, zero = torch.rand(n, groups), torch.randint(16, (n, groups), dtype=torch.uint8)
    ranges = (torch.rand(groups) + 0.1, torch.rand(groups) * 15) if op == "int4_linear_a4" else ()
    return torch.randn(m, k), codes, scale, zero, torch.randn(n), None, *ranges, group


@pytest.mark.parametrize("op", ["int4_linear_a8", "int4_linear_a4"])
def test_the_largest_codes_do_not_saturate(level: str, op: str) -> None:
    k = 256
    codes, scale = torch.full((20, k // 2), 0xFF, dtype=torch.uint8), torch.ones(20, 1)
    zero = torch.tensor([0, 15] * 10, dtype=torch.uint8)[:, None]
    codes[:, 1::2] = 0
    ranges = (torch.ones(1), torch.zeros(1)) if op == "int4_linear_a4" else ()
    for x in (torch.full((3, k), 127.0), torch.full((3, k), -127.0)):
        args = (x, codes, scale, zero, None, None, *ranges, k)
        with backend("reference"):
            expected = REGISTRY[op](*args)
        assert_exact(REGISTRY[op](*args), expected, "y")


@pytest.mark.parametrize("op", [*EXACT, *ACCURATE])
def test_bits_do_not_depend_on_threads(op: str) -> None:
    for sample in (s for s in of(op) if s.large):
        args = sample.build(FLOAT32, CPU)
        torch.set_num_threads(1)
        expected = run(sample, args, "cpu")
        for count in (2, 3):
            torch.set_num_threads(count)
            for actual, one in zip(run(sample, args, "cpu"), expected, strict=True):
                assert_exact(actual, one, f"{sample} on {count} threads")


@pytest.mark.parametrize("dtype", list(DTYPES), ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("op", ["int4_linear_a8", "int4_linear_a4"])
def test_what_is_no_number(level: str, op: str, dtype: torch.dtype) -> None:
    """Of 8 bits a row with a NaN or an infinity is NaN; of 4 an infinity is the end of the range.
    Other rows, rows of zeros and of the smallest numbers are as ever."""
    x, codes, scale, _, bias, *rest = operands(op, 6, 20, 48, 16)
    x[1, 20], x[2, 3], x[3, 5] = torch.nan, torch.inf, -torch.inf
    x[4] = 0
    x[5] = torch.finfo(dtype).smallest_normal / 8
    args = (x.to(dtype), codes, scale, None, bias.to(dtype), *rest)
    with backend("reference"):
        expected = REGISTRY[op](*args)
    actual = REGISTRY[op](*args)
    assert_exact(actual, expected, "y")
    lost = actual.isnan().all(1).tolist()
    assert lost == [False, True, *[op == "int4_linear_a8"] * 2, False, False]


def test_ranges_that_are_none(level: str) -> None:
    x = torch.randn(3, 40)
    x[1, 1] = torch.nan
    for scale, zero in ((0.0, 3.0), (-1.0, 3.0), (torch.nan, 3.0), (1.0, torch.nan), (0.1, -4.0)):
        args = (x, torch.tensor([scale]), torch.tensor([zero]), None, 40)
        for sample, more in (("fake_quantize4", ()), ("fake_quantize4_backward", ([True] * 3,))):
            op, lead = REGISTRY[sample], (torch.ones_like(x),) if more else ()
            with backend("reference"):
                expected = op(*lead, *args, *more)
            actual = op(*lead, *args, *more)
            for a, e in zip(*(v if more else (v,) for v in (actual, expected)), strict=True):
                assert torch.equal(a.isnan(), e.isnan()), (scale, zero)


@pytest.mark.parametrize("bad", [-1, 1 << 20, None])
@pytest.mark.parametrize("op", [*EXACT, "fake_quantize4_backward"])
def test_what_is_no_permutation_is_refused(op: str, bad: int | None) -> None:
    args = list(next(s for s in samples(op) if s.name == "perm").build(FLOAT32, CPU))
    at = REGISTRY[op].parameters.index("perm")
    args[at] = args[at].clone()
    args[at][3] = args[at][4] if bad is None else bad
    with pytest.raises(ValueError, match=f"{op}: expected perm of a permutation"):
        REGISTRY[op](*args)


def test_a_zero_that_is_no_code_is_an_error() -> None:
    x, codes, scale, zero, *rest = operands("int4_linear_a8", 2, 3, 16, 8)
    zero[1, 1] = 16
    with pytest.raises(RuntimeError, match="a zero of 16"):
        REGISTRY["int4_linear_a8"](x, codes, scale, zero, *rest)


def test_the_nibble_left_over_is_not_read(level: str) -> None:
    args = operands("int4_linear_a8", 3, 5, 21, 8)
    expected = REGISTRY["int4_linear_a8"](*args)
    args[1][:, -1] ^= 0xF0
    assert_exact(REGISTRY["int4_linear_a8"](*args), expected, "y")
