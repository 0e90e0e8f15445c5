"""The repair of Triton's interpreter: bfloat16 arithmetic is exact against PyTorch's.

A Triton release that changes the interpreter's inside fails here, not in a kernel's accuracy.
"""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from pyfastft.testing.tolerance import assert_exact  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU here"
)

SIZE = 256


@triton.jit
def _apply_kernel(out_ptr, a_ptr, b_ptr, c_ptr, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    a, b, c = tl.load(a_ptr + index), tl.load(b_ptr + index), tl.load(c_ptr + index)
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "sub":
        result = a - b
    elif OPERATION == "mul":
        result = a * b
    elif OPERATION == "div":
        result = a / b
    elif OPERATION == "neg":
        result = -a
    elif OPERATION == "abs":
        result = tl.abs(a)
    elif OPERATION == "compare":
        result = tl.where(a > b, 1.0, 0.0)
    elif OPERATION == "where":
        result = tl.where(a > b, a, b)
    elif OPERATION == "maximum":
        result = tl.maximum(a, b)
    elif OPERATION == "scalar":
        result = a * 2.0
    elif OPERATION == "full":
        result = tl.full((SIZE,), 1.5, tl.bfloat16) + a * 0.0
    elif OPERATION == "fma":
        result = tl.fma(a, b, c)
    elif OPERATION == "cumsum":
        result = tl.cumsum(a, axis=0)
    elif OPERATION == "sum":
        result = tl.full((SIZE,), 0.0, tl.bfloat16) + tl.sum(a, axis=0)
    elif OPERATION == "narrow":
        result = (a.to(tl.float32) * 1.2345678).to(tl.bfloat16)
    elif OPERATION == "half":
        result = a.to(tl.float16).to(tl.bfloat16)
    tl.store(out_ptr + index, result)


@triton.jit
def _dot_kernel(out_ptr, a_ptr, b_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + index, tl.dot(tl.load(a_ptr + index), tl.load(b_ptr + index)))


# In float32, rounded once: what a GPU does, and what PyTorch does on a CPU.
OPERATIONS = {
    "add": lambda a, b, c: a + b,
    "sub": lambda a, b, c: a - b,
    "mul": lambda a, b, c: a * b,
    "div": lambda a, b, c: a / b,
    "neg": lambda a, b, c: -a,
    "abs": lambda a, b, c: a.abs(),
    "compare": lambda a, b, c: (a > b).float(),
    "where": lambda a, b, c: torch.where(a > b, a, b),
    "maximum": lambda a, b, c: torch.maximum(a, b),
    "scalar": lambda a, b, c: a * 2,
    "full": lambda a, b, c: torch.full_like(a, 1.5),
    "fma": lambda a, b, c: (a.double() * b.double() + c.double()).float(),
    "cumsum": lambda a, b, c: a.cumsum(0),
    "sum": lambda a, b, c: a.sum().expand(SIZE),
    "narrow": lambda a, b, c: a * torch.tensor(1.2345678),
    "half": lambda a, b, c: a.half().float(),
}


def _draw(*size: int) -> torch.Tensor:
    # Multiples of 1/64 below 4: sums of them are exact in float32 in any order.
    return torch.randint(-255, 256, size).div(64).bfloat16()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_bfloat16_arithmetic_is_exact(operation: str) -> None:
    a, b, c = _draw(SIZE), _draw(SIZE), _draw(SIZE)
    b = torch.where(b == 0, 1, b)
    out = torch.empty_like(a)
    _apply_kernel[(1,)](out, a, b, c, OPERATION=operation, SIZE=SIZE)
    expected = OPERATIONS[operation](a.float(), b.float(), c.float())
    assert_exact(out, expected.bfloat16(), operation)


def test_bfloat16_dot_is_exact() -> None:
    a, b = _draw(32, 32), _draw(32, 32)
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](out, a, b, SIZE=32)
    assert_exact(out, a.float() @ b.float(), "dot")


def test_casts_round_to_nearest_even_and_keep_specials() -> None:
    @triton.jit
    def cast_kernel(out_ptr, a_ptr, SIZE: tl.constexpr):
        index = tl.arange(0, SIZE)
        tl.store(out_ptr + index, tl.load(a_ptr + index).to(tl.bfloat16))

    values = torch.randn(SIZE).mul(100)
    # Ties, a value that overflows, a subnormal, and what is not a number.
    special = [1.00390625, 1.01171875, 3.4e38, 1e-40, float("inf"), -float("inf"), float("nan")]
    values[: len(special)] = torch.tensor(special)
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    cast_kernel[(1,)](out, values, SIZE=SIZE)
    assert_exact(out, values.bfloat16(), "cast")
