"""The CPU's GEMM core by itself: accuracy at the edges of its tiles, at any strides, and one result
whatever the number of threads and whether the weight was packed before."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch

from pyfastft import _native
from pyfastft._native import DTYPES
from pyfastft.native._gemm import matmul
from pyfastft.native._packing import pack, packed_bytes, unpack
from pyfastft.testing.tolerance import assert_accurate, assert_exact

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=str(_native.why_no_cpu() or "")
)

HEADER_BYTES = 64
LEVELS = _native.ISA_LEVELS if _native.why_no_cpu() is None else ()
names = pytest.mark.parametrize("dtype", list(DTYPES), ids=lambda d: str(d).split(".")[1])


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


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def product(a: torch.Tensor, b: torch.Tensor | None, n: int = 0, **packed: object) -> torch.Tensor:
    out = torch.full((a.shape[0], n if b is None else b.shape[0]), torch.nan, dtype=a.dtype)
    matmul(out, a, b, **packed)
    return out


def every_way(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """a b^T with b read in place and from both of its packed forms."""
    n = b.shape[0]
    return {
        "plain": product(a, b),
        "contiguous along the result": product(a, b.T.contiguous().T),
        "strided": product(a, torch.stack([b, b], -1)[..., 0]),
        "packed": product(a, None, n, packed_b=pack(b)),
        "packed for the other product": product(
            a, None, n, packed_b=pack(b, transposed=True), packed_transposed=True
        ),
    }


# M, N, K at, below and above the edges of strips, tiles, blocks of C and of depth. Up to 4 rows are
# summed in another order than more of them; above 224 columns are packed for all threads.
SIZES = [
    (1, 1, 1),
    (1, 17, 31),
    (1, 300, 769),
    (2, 33, 384),
    (3, 40, 2000),
    (4, 31, 12290),
    (5, 32, 385),
    (14, 65, 767),
    (15, 16, 768),
    (29, 257, 63),
    (57, 80, 1153),
    (224, 33, 100),
    (231, 290, 801),
]


@names
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_accurate_and_the_same_bits_every_way(level: str, size, dtype: torch.dtype) -> None:
    m, n, k = size
    a, b = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype)
    results = every_way(a, b)
    assert_accurate(results["plain"], a.double() @ b.double().T, a @ b.T)
    for how, result in results.items():
        assert_exact(result, results["plain"], how)


@names
@pytest.mark.parametrize("m", [1, 4, 20, 300])
def test_strides_of_the_rows(level: str, m: int, dtype: torch.dtype) -> None:
    k, b = 70, draw(50, 70, dtype=dtype)
    dense = draw(m, k, dtype=dtype)
    expected = product(dense, b)
    assert_exact(product(dense.T.contiguous().T, b), expected, "transposed")
    assert_exact(product(torch.stack([dense, dense], -1)[..., 1], b), expected, "strided")
    assert_exact(product(dense[:1].expand(m, k), b), product(dense[:1].repeat(m, 1), b), "expanded")


@pytest.mark.parametrize("size", [(0, 5, 7), (4, 0, 7), (4, 5, 0), (0, 0, 0)])
def test_empty(level: str, size) -> None:
    m, n, k = size
    for how, result in every_way(torch.ones(m, k), torch.ones(n, k)).items():
        assert_exact(result, torch.zeros(m, n), how)


@names
@pytest.mark.parametrize("size", [(1, 3000, 900), (4, 500, 400), (33, 700, 500), (450, 300, 400)])
def test_bits_do_not_depend_on_threads(size, dtype: torch.dtype) -> None:
    m, n, k = size
    a, b = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype)
    expected = product(a, b)
    for count in (2, 3, 2, 4):
        torch.set_num_threads(count)
        for how, result in every_way(a, b).items():
            assert_exact(result, expected, f"{count} threads, {how}")


def test_an_operand_too_large_to_be_packed_at_once() -> None:
    a, b = draw(1100, 4300, dtype=torch.float32), draw(1300, 4300, dtype=torch.float32)
    assert_accurate(product(a, b), a.double() @ b.double().T, a @ b.T)


@pytest.mark.parametrize("m", [2, 43])
def test_rows_and_columns_stay_apart(level: str, m: int) -> None:
    """What is not finite stays in its own row and column: packing pads with zeros."""
    a, b = torch.ones(m, 20), torch.ones(35, 20)
    a[1, 3], b[7, 2] = torch.inf, -torch.inf
    expected = a.double() @ b.double().T
    for how, result in every_way(a, b).items():
        assert_exact(result, expected.float(), how)


# ---- packed weights --------------------------------------------------------------------------


@names
@pytest.mark.parametrize("size", [(1, 1), (16, 384), (17, 769), (50, 31), (0, 3), (3, 0)])
def test_what_was_packed_comes_back(level: str, size, dtype: torch.dtype) -> None:
    """Every bit pattern, NaNs with their payloads included."""
    n, k = size
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, (n, k), dtype=torch.int64).to(integer)
    weight = bits.view(dtype)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(unpack(pack(weight), n, k, dtype).view(integer), bits)
        across = unpack(pack(weight, transposed=True), k, n, dtype)
        assert torch.equal(across.view(integer), bits.T)
        strided = torch.stack([bits, bits], -1).view(dtype)[..., 0]
        assert torch.equal(unpack(pack(strided), n, k, dtype).view(integer), bits)


@names
def test_packed_is_no_larger_than_the_weight(level: str, dtype: torch.dtype) -> None:
    size = 4 if dtype is torch.float32 else 2
    assert packed_bytes(64, 100, dtype) == HEADER_BYTES + 64 * 100 * size
    assert packed_bytes(65, 100, dtype) <= HEADER_BYTES + 80 * 100 * size
    assert pack(torch.ones(65, 101, dtype=dtype)).numel() == packed_bytes(65, 101, dtype)


def damaged(packed: torch.Tensor, offset: int) -> torch.Tensor:
    packed = packed.clone()
    packed[offset] ^= 1
    return packed


WRONG: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, int], str]] = {
    "shape": (lambda packed: packed, (40, 31), r"is \(40, 30\).*not \(40, 31\)"),
    "transposed": (lambda packed: packed, (30, 40), r"is \(40, 30\).*not \(30, 40\)"),
    "cut short": (lambda packed: packed[:-1], (40, 30), "bytes, not"),
    "no header": (lambda packed: packed[: HEADER_BYTES - 1], (40, 30), "are no packed weight"),
    "no magic": (lambda packed: damaged(packed, 0), (40, 30), "these bytes are no packed weight"),
    "lanes": (lambda packed: damaged(packed, 8), (40, 30), "another instruction set"),
    "block": (lambda packed: damaged(packed, 32), (40, 30), "another instruction set"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_the_packed_weight_is_refused(level: str, what: str) -> None:
    change, (n, k), says = WRONG[what]
    packed = change(pack(torch.ones(40, 30)))
    with pytest.raises(RuntimeError, match=says):
        unpack(packed, n, k, torch.float32)
    with pytest.raises(RuntimeError, match=says):
        product(torch.ones(3, k), None, n, packed_b=packed)
    with pytest.raises(RuntimeError, match=says):
        product(torch.ones(3, n), None, k, packed_b=packed, packed_transposed=True)


@pytest.mark.parametrize(("at", "then"), [("scalar", "avx2"), ("avx512", "avx2")])
def test_another_level_is_refused(at: str, then: str) -> None:
    if LEVELS.index(at) > _native.cpu().isa()[0] or LEVELS.index(then) > _native.cpu().isa()[0]:
        pytest.skip("a level does not run here")
    with _native.cpu_isa(at):
        packed = pack(torch.ones(40, 30))
    with _native.cpu_isa(then), pytest.raises(RuntimeError, match="pack it again"):
        unpack(packed, 40, 30, torch.float32)


def test_another_dtype_is_refused(level: str) -> None:
    packed = pack(torch.ones(40, 30, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"dtype code 1.*with 2"):
        unpack(packed, 40, 30, torch.float16)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: pack([[1.0]]), TypeError, "pack: expected weight of type Tensor"),
        (lambda: pack(torch.ones(3)), ValueError, r"weight of shape \(N, K\), got \(3,\)"),
        (lambda: pack(torch.ones(3, 3).double()), TypeError, "got float64"),
        (lambda: pack(torch.ones(3, 3).to_sparse()), TypeError, "a dense layout"),
        (lambda: pack(torch.ones(3, 3, device="meta")), ValueError, r"device cpu .*got meta"),
        (lambda: unpack(torch.ones(99), 1, 1, torch.float32), TypeError, "uint8"),
        (
            lambda: unpack(torch.ones(99, 2, dtype=torch.uint8)[:, 0], 1, 1, torch.float32),
            ValueError,
            "contiguous",
        ),
        (
            lambda: unpack(pack(torch.ones(2, 2)), 2, 2, torch.float64),
            TypeError,
            "dtype of float32 or bfloat16 or float16, got float64",
        ),
        (lambda: unpack(pack(torch.ones(2, 2)), -2, 2, torch.float32), ValueError, "n and k"),
    ],
)
def test_bad_input_is_named(call, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_both_forms_at_once_are_refused() -> None:
    b = torch.ones(4, 5)
    with pytest.raises(RuntimeError, match="both b and packed_b"):
        product(torch.ones(3, 5), b, packed_b=pack(b))


def test_a_weight_at_any_address_is_read(level: str) -> None:
    """Packed bytes may begin anywhere that a tensor's storage offset allows."""
    weight = torch.randn(37, 50)
    packed = pack(weight)
    shifted = torch.empty(packed.numel() + 8, dtype=torch.uint8)[8:]
    ctypes.memmove(shifted.data_ptr(), packed.data_ptr(), packed.numel())
    assert_exact(unpack(shifted, 37, 50, torch.float32), weight)
    a = torch.randn(6, 50)
    assert_exact(product(a, None, 37, packed_b=shifted), product(a, weight))
