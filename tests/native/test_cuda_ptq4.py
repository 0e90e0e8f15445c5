"""The CUDA kernels of the ptq4 family on the CPU: compiled by g++ against ``simt/cuda_runtime.h``,
under AddressSanitizer and UndefinedBehaviorSanitizer they give what the float64 reference gives,
and ThreadSanitizer finds no race in them. Tensor cores are loops there, asynchronous copies happen
when they are waited for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from pyfastft import backend
from pyfastft._codebook import TABLES
from pyfastft._native import DTYPES
from pyfastft._op import REGISTRY
from pyfastft.testing.tolerance import assert_accurate, assert_exact

if TYPE_CHECKING:
    from conftest import Kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")

# Mirrors ft_zero of csrc/include/fastft/codebook.h.
ZERO_KINDS = {None: 0, "uint8": 1, "float": 2}
SHORT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A product of one size; what W is made of; where x and the codes lie in memory."""

    m: int
    n: int
    k: int
    group: int
    dtype: str = "bf16"
    zero: str | None = None
    codebook: str = "int4"
    half_scale: bool = False
    splits: int = 1
    bias: bool = True
    padding: int = 0  # elements between rows of x
    perm: bool = False

    def __str__(self) -> str:
        parts = (f"{self.m}x{self.n}x{self.k}", f"g{self.group}", self.dtype, self.zero)
        last = (self.codebook, f"splits{self.splits}")
        return "-".join(str(part) for part in (*parts, *last) if part)


class Operands:
    """Random operands of a case."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.m + case.n + case.k)
        groups = -(-case.k // case.group)
        dtype = SHORT[case.dtype]

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        def integers(limit: int, *size: int) -> torch.Tensor:
            return torch.randint(limit, size, generator=generator, dtype=torch.uint8)

        self.case, self.dtype = case, dtype
        self.codes = integers(256, case.n, -(-case.k // 2))
        self.scale = (normal(case.n, groups) * case.k**-0.5).float()
        if case.half_scale:
            self.scale = self.scale.bfloat16()
        self.zero = None
        if case.zero == "uint8":
            self.zero = integers(16, case.n, groups)
            self.zero[0] = 255
        elif case.zero == "float":
            self.zero = (7.5 + 2 * normal(case.n, groups)).to(self.scale.dtype)
        self.x = normal(case.m, case.k + case.padding).to(dtype)[:, : case.k]
        self.bias = normal(case.n).to(dtype) if case.bias else None
        self.table = None
        if case.codebook != "int4":
            self.table = torch.tensor(TABLES[case.codebook])
        self.perm = None
        if case.perm:
            self.perm = torch.randperm(case.k, generator=generator).int()

    def shared(self) -> dict[str, torch.Tensor | int | None]:
        return {
            "codes": self.codes,
            "scale": self.scale,
            "zero": self.zero,
            "table": self.table,
            "n": self.case.n,
            "k": self.case.k,
            "group_size": self.case.group,
            "scale_dtype": DTYPES[self.scale.dtype],
            "zero_kind": ZERO_KINDS[self.case.zero],
            "dtype": DTYPES[self.dtype],
            "stream": None,
        }

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        double = dtype is torch.float64
        scale = self.scale.double() if double else self.scale
        zero = self.zero
        if double and zero is not None and zero.is_floating_point():
            zero = zero.double()
        sizes = (self.case.k, self.case.group, self.case.codebook, dtype)
        with backend("reference"):
            return REGISTRY["int4_dequantize"](self.codes, scale, zero, self.perm, *sizes)

    def run(self, kernels: Kernels, function: str) -> torch.Tensor:
        case = self.case
        y = torch.full((case.m, case.n), torch.nan, dtype=self.dtype)
        floats = case.splits * case.m * case.n if case.splits > 1 else 0
        kernels.call(
            function,
            y=y,
            partials=torch.full((floats,), torch.nan),
            x=self.x,
            bias=self.bias,
            partials_floats=floats,
            m=case.m,
            x_stride_m=self.x.stride(0),
            splits=case.splits,
            **self.shared(),
        )
        return y

    def check(self, kernels: Kernels, function: str) -> None:
        actual = self.run(kernels, function)
        linear = torch.nn.functional.linear
        bias = None if self.bias is None else self.bias.double()
        truth = linear(self.x.double(), self.weight(torch.float64), bias)
        naive = linear(self.x, self.weight(self.dtype), self.bias)
        assert_accurate(actual, truth, naive, what=f"{function} of {self.case}")


WEIGHTS = (
    Case(0, 5, 7, 4, "fp32", zero="float", perm=True),
    Case(0, 40, 64, 32, "bf16", zero="uint8", half_scale=True),
    Case(0, 9, 33, 64, "fp16", codebook="nf4"),
    Case(0, 17, 48, 16, "fp32", codebook="fp4"),
    Case(0, 3, 40, 5, "bf16", perm=True),
)


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_dequantize(kernels: Kernels, case: Case) -> None:
    operands = Operands(case)
    weight = torch.full((case.n, case.k), torch.nan, dtype=operands.dtype)
    every = {"first_column": 0, "columns": case.k}
    kernels.call("int4_dequantize", weight=weight, perm=operands.perm, **every, **operands.shared())
    expected = operands.weight(operands.dtype)
    assert_exact(weight, expected, "weight")
    if case.perm:
        return
    for first, columns in ((2, 3), (8, 16)):
        if first + columns > case.k:
            continue
        panel = torch.full((case.n, columns), torch.nan, dtype=operands.dtype)
        some = {"perm": None, "first_column": first, "columns": columns}
        kernels.call("int4_dequantize", weight=panel, **some, **operands.shared())
        assert_exact(panel, expected[:, first : first + columns], "panel")


# More than one slab and one block of rows; K that fills neither; rows at odd addresses.
GEMV = (
    Case(1, 19, 1100, 1200, "fp32", bias=False),
    Case(2, 9, 1056, 32, "bf16", zero="uint8", half_scale=True, splits=2),
    Case(3, 8, 640, 128, "fp16", zero="float", padding=8),
    Case(4, 5, 2624, 48, "fp32", codebook="nf4", splits=3, padding=3),
    Case(1, 16, 77, 16, "bf16", zero="float"),
)


@pytest.mark.parametrize("case", GEMV, ids=str)
def test_gemv(kernels: Kernels, case: Case) -> None:
    Operands(case).check(kernels, "int4_gemv")


# Every number of tiles of x, both ways to take a zero point away, tables, parts of K.
MMA = (
    Case(5, 130, 160, 32, "bf16"),
    Case(17, 40, 288, 96, "fp16", zero="float", splits=2, padding=8),
    Case(40, 20, 128, 64, "bf16", zero="uint8", half_scale=True, bias=False),
)
MORE_MMA = (
    Case(64, 140, 640, 128, "bf16", zero="float"),
    Case(64, 128, 640, 32, "fp16", zero="uint8", splits=2),
    Case(33, 9, 96, 4096, "bf16", codebook="nf4"),
    Case(1, 128, 1312, 64, "fp16", codebook="fp4", splits=4, half_scale=True),
    Case(32, 257, 224, 64, "bf16", zero="uint8"),
)


@pytest.mark.parametrize("case", MMA, ids=str)
def test_mma(kernels: Kernels, case: Case) -> None:
    Operands(case).check(kernels, "int4_mma")


@pytest.mark.more
@pytest.mark.parametrize("case", MORE_MMA, ids=str)
def test_every_way_of_mma(kernels: Kernels, case: Case) -> None:
    Operands(case).check(kernels, "int4_mma")


@pytest.mark.parametrize(
    ("function", "case", "message"),
    [
        ("int4_gemv", Case(5, 8, 32, 16), "int4_gemv: 5 rows, at most 4"),
        ("int4_gemv", Case(1, 8, 32, 8), "int4_gemv: groups of 8"),
        ("int4_mma", Case(65, 8, 32, 32), "int4_mma: 65 rows, at most 64"),
        ("int4_mma", Case(5, 8, 48, 32), "int4_mma: K 48, groups of 32"),
        ("int4_mma", Case(5, 8, 64, 32, padding=1), "int4_mma: rows do not begin at 16 bytes"),
        ("int4_mma", Case(5, 8, 64, 32, "fp32"), "int4_mma: no kernel for dtype 0"),
    ],
    ids=str,
)
def test_what_a_kernel_cannot_do_is_refused(
    kernels: Kernels, function: str, case: Case, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        Operands(case).run(kernels, function)


# Several stages of copies, each of which is written again.
RACES = (
    ("int4_gemv", Case(2, 16, 1056, 32, splits=2)),
    ("int4_mma", Case(5, 16, 640, 128, codebook="nf4")),
)


@pytest.mark.parametrize(("function", "case"), RACES, ids=str)
def test_no_races(racing: Callable[[int], Kernels], function: str, case: Case) -> None:
    Operands(case).check(racing(0), function)


# Of mma: the first tile of codes, the fourth, which overwrites the stage that was read before, and
# the two between the halves of K. Of gemv: the table (which others fill), and both sums.
BARRIERS = (
    ("int4_gemv", Case(2, 16, 640, 32, codebook="nf4"), 1),
    ("int4_gemv", Case(2, 16, 640, 32), 2),
    ("int4_gemv", Case(2, 16, 640, 32), 3),
    ("int4_mma", Case(5, 16, 640, 128), 1),
    ("int4_mma", Case(5, 16, 640, 128), 2),
    ("int4_mma", Case(5, 16, 640, 128), 6),
    ("int4_mma", Case(5, 16, 640, 128), 7),
    ("int4_mma", Case(5, 16, 640, 128), 8),
)


@pytest.mark.more
@pytest.mark.parametrize(("function", "case", "barrier"), BARRIERS, ids=str)
def test_a_removed_barrier_is_a_race(
    racing: Callable[[int], Kernels], function: str, case: Case, barrier: int
) -> None:
    with pytest.raises(ChildProcessError, match="ThreadSanitizer: data race"):
        Operands(case).run(racing(barrier), function)
