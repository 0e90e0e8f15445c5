"""Quantized activations and int8 weights on Triton: the reference's bits where they are promised,
and accuracy at the edges of tiles."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pyfastft import backend
from pyfastft._op import REGISTRY
from pyfastft.testing.samples import FLOAT32, PRECISIONS, Precision, Sample, samples
from pyfastft.testing.tolerance import assert_exact

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = ("int4_linear_a8", "int4_linear_a4", "fake_quantize4")


def expect_reference_bits(op: str, args: tuple) -> torch.Tensor:
    with backend("reference"):
        expected = REGISTRY[op](*args)
    with backend("triton"):
        actual = REGISTRY[op](*args)
    assert_exact(actual, expected, "output")
    return actual


@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
@pytest.mark.parametrize(
    "sample",
    [sample for op in EXACT for sample in samples(op) if not sample.large],
    ids=lambda s: f"{s.op}-{s}",
)
def test_the_reference_bits(sample: Sample, precision: Precision) -> None:
    expect_reference_bits(sample.op, sample.build(precision, DEVICE))


@pytest.mark.parametrize("sample", [s for s in samples("int4_linear_a8") if s.large], ids=str)
def test_the_reference_bits_of_large_samples(sample: Sample) -> None:
    expect_reference_bits(sample.op, sample.build(FLOAT32, DEVICE))


# Groups longer than a tile, on the edge of a byte, and of half of what a product takes at once.
@pytest.mark.parametrize(("k", "group"), [(1500, 1500), (260, 129), (96, 32)])
@pytest.mark.parametrize("op", ["int4_linear_a8", "int4_linear_a4"])
def test_groups_of_any_size(op: str, k: int, group: int) -> None:
    m, n, groups = 17, 20, -(-k // group)
    codes = torch.randint(256, (n, -(-k // 2)), dtype=torch.uint8)
    scale, zero = torch.rand(n, groups), torch.randint(16, (n, groups), dtype=torch.uint8)
    ranges = (torch.rand(groups) + 0.1, torch.rand(groups) * 15) if op == "int4_linear_a4" else ()
    args = (torch.randn(m, k), codes, scale, zero, torch.randn(n), None, *ranges, group)
    args = tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args)
    expect_reference_bits(op, args)


@pytest.mark.parametrize("op", ["int4_linear_a8", "int4_linear_a4"])
def test_what_is_no_number(op: str) -> None:
    x = torch.randn(6, 48, device=DEVICE)
    x[1, 20], x[2, 3], x[3, 5] = torch.nan, torch.inf, -torch.inf
    x[4], x[5] = 0, 1e-39
    codes = torch.randint(256, (20, 24), dtype=torch.uint8, device=DEVICE)
    scale = torch.rand(20, 3, device=DEVICE)
    ones = torch.ones(1, device=DEVICE)
    ranges = (ones, 3 * ones) if op == "int4_linear_a4" else ()
    y = expect_reference_bits(op, (x, codes, scale, None, None, None, *ranges, 16))
    lost = y.isnan().all(1).tolist()
    assert lost == [False, True, *[op == "int4_linear_a8"] * 2, False, False]
