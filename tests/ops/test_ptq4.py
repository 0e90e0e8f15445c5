"""The ptq4 family beyond what the registry's tests hold every op to."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import pyfastft as ft
from pyfastft import _native, ops
from pyfastft.native import _gemm
from pyfastft.testing.tolerance import assert_accurate, assert_exact

pytestmark = pytest.mark.skipif(
    _native.why_no_cpu() is not None, reason=str(_native.why_no_cpu() or "")
)


def test_the_order_of_nibbles_and_of_features() -> None:
    codes = torch.tensor([[0x10, 0x32, 0x04]], dtype=torch.uint8)  # 0 1 2 3 4
    scale = torch.tensor([[1.0, 10.0, 100.0]])
    zero = torch.tensor([[0, 1, 2]], dtype=torch.uint8)
    perm = torch.tensor([4, 2, 0, 1, 3], dtype=torch.int32)
    weight = ft.functional.int4_dequantize(codes, scale, zero=zero, perm=perm, k=5, group_size=2)
    assert weight.tolist() == [[10.0, 20.0, 1.0, 200.0, 0.0]]


def drawn(
    n: int, k: int, group: int, codebook: str = "int4", zero: str = ""
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(0)
    groups = -(-k // group)
    codes = torch.randint(256, (n, -(-k // 2)), dtype=torch.uint8)
    if k % 2:
        codes[:, -1] &= 15
    scale = (0.5 + torch.rand(n, groups)) * k**-0.5 / (1 if codebook != "int4" else 8)
    if zero == "uint8":
        return codes, scale, torch.randint(16, (n, groups), dtype=torch.uint8)
    return codes, scale, 7.5 + torch.randn(n, groups) if zero else None


@pytest.mark.parametrize(("m", "codebook", "zero"), [(1, "int4", ""), (3, "nf4", "")])
@pytest.mark.parametrize("group", [32, 128])
def test_no_less_accurate_than_a_dense_product(
    m: int, codebook: str, zero: str, group: int
) -> None:
    for rows in (m, 33):
        codes, scale, z = drawn(96, 1024, group, codebook, zero)
        x = torch.randn(rows, 1024).bfloat16()
        weight = ft.functional.int4_dequantize(
            codes, scale, zero=z, group_size=group, codebook=codebook
        )
        y = ft.functional.int4_linear(x, codes, scale, zero=z, group_size=group, codebook=codebook)
        truth = x.double() @ weight.double().T
        dense = torch.nn.functional.linear(x, weight.bfloat16())
        ours, theirs = ((a.double() - truth).square().mean().sqrt() for a in (y, dense))
        assert ours <= 1.2 * theirs


@pytest.mark.parametrize("zero", ["", "uint8", "float"])
@pytest.mark.parametrize("group", [8, 40, 128, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_identity_recover_the_weight(zero: str, group: int, dtype: torch.dtype) -> None:
    k = 300
    codes, scale, z = drawn(21, k, group, zero=zero)
    weight = ft.functional.int4_dequantize(codes, scale, zero=z, group_size=group, dtype=dtype)
    eye = torch.eye(k, dtype=dtype)
    for rows in (1, 2, 4, 20):
        for first in (0, 120, 280):
            x = eye[first : first + rows]
            y = ft.functional.int4_linear(x, codes, scale, zero=z, group_size=group)
            assert_exact(y, weight[:, first : first + rows].T.contiguous())


@pytest.mark.parametrize("m", [6, 16, 31])
@pytest.mark.parametrize("group", [16, 128, 256, 1100])
@pytest.mark.parametrize("zero", ["", "uint8"])
def test_codes_unpacked_among_products(m: int, group: int, zero: str) -> None:
    """One strip of rows, low and tall, and several; a short strip of columns, blocks of depth."""
    codes, scale, z = drawn(50, 1100, group, zero=zero)
    x = torch.randn(m, 1100).bfloat16()
    weight = ft.functional.int4_dequantize(codes, scale, zero=z, group_size=group)
    y = ft.functional.int4_linear(x, codes, scale, zero=z, group_size=group)
    truth = x.double() @ weight.double().T
    assert_accurate(y, truth, torch.nn.functional.linear(x, weight.bfloat16()))


@pytest.mark.parametrize("m", [1, 4, 16, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_any_number_of_threads(m: int, dtype: torch.dtype) -> None:
    codes, scale, zero = drawn(700, 513, 64, zero="float")
    x = torch.randn(m, 513).to(dtype)
    need = [True] * 4
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = ft.functional.int4_linear(x, codes, scale, zero=zero, group_size=64)
            gradients = ops.int4_linear_backward(
                y, x, codes, scale, zero, None, None, 513, 64, "int4", need
            )
            results.append((y, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            assert_exact(actual, expected)


@pytest.mark.parametrize("m", [2, 30])
def test_a_permuted_weight_is_the_weight_of_permuted_features(m: int) -> None:
    k = 96
    codes, scale, zero = drawn(40, k, 16, zero="uint8")
    perm = torch.randperm(k).int()
    x = torch.randn(m, k).bfloat16()
    permuted = ft.functional.int4_linear(x, codes, scale, zero=zero, perm=perm, group_size=16)
    gathered = ft.functional.int4_linear(x[:, perm.long()], codes, scale, zero=zero, group_size=16)
    assert_exact(permuted, gathered)


@pytest.mark.parametrize("perm", [[0, 1, 2, 2], [0, 1, 2, 4], [0, 1, 2, -1]])
def test_a_perm_that_is_none(perm: list[int]) -> None:
    codes, scale, _ = drawn(3, 4, 8)
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="int4_linear: expected perm of a permutation"):
        ft.functional.int4_linear(
            x, codes, scale, perm=torch.tensor(perm, dtype=torch.int32), group_size=8
        )


def test_dx_has_the_bits_of_a_dense_product() -> None:
    codes, scale, _ = drawn(200, 160, 32, "nf4")
    grad = torch.randn(70, 200).bfloat16()
    weight = ft.functional.int4_dequantize(
        codes, scale, group_size=32, codebook="nf4", dtype=torch.bfloat16
    )
    dense = torch.empty(70, 160, dtype=torch.bfloat16)
    _gemm.matmul(dense, grad, weight.T)
    need = [True, False, False, False]
    dx = ops.int4_linear_backward(grad, None, codes, scale, None, None, None, 160, 32, "nf4", need)[
        0
    ]
    assert_exact(dx, dense)


@pytest.mark.parametrize("level", _native.ISA_LEVELS)
@pytest.mark.parametrize("codebook", ["int4", "nf4", "fp4"])
def test_every_level_dequantizes_to_the_same_bits(level: str, codebook: str) -> None:
    if level_of(level) > _native.cpu().isa()[0]:
        pytest.skip(f"this CPU has no {level}")
    zero = "float" if codebook == "int4" else ""
    for k, group in ((1, 1), (37, 5), (64, 32), (131, 16)):
        codes, scale, z = drawn(19, k, group, codebook, zero)
        perm = torch.randperm(k).int()
        for order in (None, perm):
            args = (codes, scale, z, order, k, group, codebook, torch.bfloat16)
            with ft.backend("reference"):
                expected = ops.int4_dequantize(*args)
            with _native.cpu_isa(level), ft.backend("cpu"):
                assert_exact(ops.int4_dequantize(*args), expected)


@pytest.mark.parametrize("level", _native.ISA_LEVELS)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 19])
@pytest.mark.parametrize(("k", "group"), [(24, 8), (300, 128), (33, 3), (520, 64)])
def test_every_level_is_accurate(level: str, m: int, k: int, group: int) -> None:
    if level_of(level) > _native.cpu().isa()[0]:
        pytest.skip(f"this CPU has no {level}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for codebook, zero in (("int4", ""), ("int4", "uint8"), ("nf4", "")):
            codes, scale, z = drawn(35, k, group, codebook, zero)
            x = torch.randn(m, k).to(dtype)
            args = (x, codes, scale, z, None, None, None, group, codebook)
            with ft.backend("reference"):
                truth = ops.int4_linear(x.double(), codes, scale.double(), *args[3:])
                naive = ops.int4_linear(*args)
            with _native.cpu_isa(level), ft.backend("cpu"):
                assert_accurate(ops.int4_linear(*args), truth, naive)


def level_of(name: str) -> int:
    return _native.ISA_LEVELS.index(name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codebook": 7}, "unknown codebook 7"),
        ({"zero_kind": 5}, "unknown kind of zero 5"),
        ({"scale_dtype": 2}, "unknown dtype code 2 of the scale"),
        ({"dtype": 9}, "unknown dtype code 9"),
        ({"group_size": 0}, "group_size 0"),
        ({"m": -1}, "m -1 is no size"),
        ({"n": -2}, "sizes n -2"),
        ({"codebook": 1, "zero_kind": 2}, "codebook 1 has no zero"),
        ({"zero_kind": 1}, "zero is missing"),
    ],
)
def test_the_library_refuses_what_no_contract_lets_through(
    changed: dict[str, int], message: str
) -> None:
    codes, scale, _ = drawn(3, 8, 8)
    x, y = torch.randn(2, 8), torch.empty(2, 3)
    arguments = {
        **{"y": y.data_ptr(), "x": x.data_ptr(), "codes": codes.data_ptr()},
        **{"scale": scale.data_ptr(), "zero": 0, "bias": 0, "perm": 0, "m": 2, "n": 3, "k": 8},
        **{"group_size": 8, "x_stride_m": 8, "x_stride_k": 1, "codebook": 0, "zero_kind": 0},
        **{"scale_dtype": 0, "dtype": 0, "threads": 1},
    }
    with pytest.raises(RuntimeError, match=message):
        _native.cpu().int4_linear(**{**arguments, **changed})


def test_no_temporary_is_as_large_as_the_weight() -> None:
    """In a process of its own: what a forward and a backward add to its peak."""
    program = """
import resource, torch
from pyfastft import ops
codes = torch.zeros(4096, 4096, dtype=torch.uint8)
scale = torch.ones(4096, 64)
x = torch.ones(300, 8192).bfloat16()
x.requires_grad_()
ops.int4_linear(x[:1, :], codes, scale, None, None, None, None, 128, "nf4")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.int4_linear(x, codes, scale, None, None, None, None, 128, "nf4").sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    dense_kib = 4096 * 8192 * 2 >> 10
    assert int(found.stdout) < dense_kib // 2
