"""The CPU kernels of the quantizers against the reference: every level of the instruction set, any
shape, any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyfastft import _native, backend
from pyfastft.functional import hqq_quantize, rtn_quantize
from pyfastft.quantization.tensor import unpack_codes
from pyfastft.testing.tolerance import assert_exact

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=_native.why_no_cpu() or "the library is there"
)

CODES = [("int4", False), ("int4", True), ("nf4", False), ("fp4", False)]
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def levels() -> list[str]:
    if _native.why_no_cpu() is not None:
        return []
    return list(_native.ISA_LEVELS[: _native.cpu().isa()[0] + 1])


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with _native.cpu_isa(request.param):
        yield request.param


@pytest.mark.parametrize("scale_dtype", SCALES, ids=str)
@pytest.mark.parametrize(("n", "k", "g"), [(5, 39, 16), (33, 7, 2), (19, 23, 5), (3, 300, 1000)])
def test_the_kernels_give_the_references_bits(level, n, k, g, scale_dtype) -> None:
    w = torch.randn(n, k)
    for codebook, symmetric in CODES:
        options = {"codebook": codebook, "symmetric": symmetric, "scale_dtype": scale_dtype}
        ours = rtn_quantize(w, group_size=g, grid=9, **options)
        with backend("reference"):
            theirs = rtn_quantize(w, group_size=g, grid=9, **options)
        for a, b in zip(ours, theirs, strict=True):
            assert a is b or torch.equal(a, b)
    for round_zero in (False, True):
        options = {"round_zero": round_zero, "scale_dtype": scale_dtype}
        ours = hqq_quantize(w, group_size=g, **options)
        with backend("reference"):
            theirs = hqq_quantize(w, group_size=g, **options)
        assert_exact(ours[1], theirs[1], "scale")
        assert float((ours[2].double() - theirs[2].double()).abs().max()) < 1e-3
        assert_codes_but_at_ties(w, k, g, ours, theirs)


def assert_codes_but_at_ties(w, k: int, g: int, ours, theirs) -> None:
    """Codes are the same, but where w / s + z is within 1e-3 of the middle of two."""
    a, b = unpack_codes(ours[0], k), unpack_codes(theirs[0], k)

    def wide(values: torch.Tensor) -> torch.Tensor:
        return values.double().repeat_interleave(g, 1)[:, :k]

    places = w.double() / wide(theirs[1]) + wide(theirs[2])
    near = ((places - places.floor()) - 0.5).abs() < 1e-3
    assert bool(((a == b) | near).all())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 20),
    k=st.integers(1, 70),
    g=st.integers(1, 80),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_number_of_threads(n, k, g, threads, seed) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours = rtn_quantize(w, group_size=g, grid=3)
        half = hqq_quantize(w, group_size=g, iterations=3)
    finally:
        torch.set_num_threads(before)
    with backend("reference"):
        theirs = rtn_quantize(w, group_size=g, grid=3)
        assert_codes_but_at_ties(w, k, g, half, hqq_quantize(w, group_size=g, iterations=3))
    for a, b in zip(ours, theirs, strict=True):
        assert_exact(a, b, "an output")


def test_many_rows_do_not_depend_on_the_threads(threads: None) -> None:
    w = torch.randn(700, 300)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append((*rtn_quantize(w, group_size=64), *hqq_quantize(w, group_size=64)))
    for a, b in zip(*found, strict=True):
        assert_exact(a, b, "an output")
