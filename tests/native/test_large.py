"""More than 2^31 elements: index arithmetic has 64 bits.

The memory is virtual: pages that nothing touches cost nothing, so strides of gigabytes do neither.
"""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from pyfastft import _native, backend, ops
from pyfastft._random import dropout_scale, dropout_threshold
from pyfastft.reference._dropout import philox4x32
from pyfastft.testing.tolerance import assert_exact

pytestmark = [
    pytest.mark.skipif(_native.why_no_cpu() is not None, reason=str(_native.why_no_cpu() or "")),
    pytest.mark.skipif(sys.platform != "linux", reason="no memory without reservation"),
]

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named by Python since 3.13
FAR = 2**31 + 40  # elements from one row to the next


def spread(matrix: torch.Tensor, strides: tuple[int, int]) -> torch.Tensor:
    """The matrix with these strides, in virtual memory."""
    elements = 1 + sum((s - 1) * t for s, t in zip(matrix.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, elements * matrix.element_size(), flags=flags)
    flat = torch.frombuffer(memory, dtype=matrix.dtype)
    return flat.as_strided(matrix.shape, strides).copy_(matrix)


def operands(dtype: torch.dtype, m: int, n: int, k: int, r: int) -> dict[str, torch.Tensor]:
    """Small integers, whose sums are exact: strides may change the order of a sum."""
    shapes = {"x": (m, k), "weight": (n, k), "lora_a": (r, k), "lora_b": (n, r), "grad": (m, n)}
    return {name: torch.randint(-4, 5, shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("far", ["rows", "columns"])
@pytest.mark.parametrize("name", ["x", "weight", "grad"])
def test_strides_beyond_32_bits(name: str, far: str, dtype: torch.dtype) -> None:
    """The same bits as from contiguous memory, in every output of both directions."""
    near = operands(dtype, m=5, n=3, k=4, r=2)
    strides = (FAR, 1) if far == "rows" else (1, FAR)
    wide = near | {name: spread(near[name], strides)}
    scaling, rng = torch.tensor(0.5), torch.tensor([1, 2])

    def both(t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        adapter = (t["weight"], t["lora_a"], t["lora_b"])
        y, xa = ops.lora_linear(t["x"], *adapter, None, scaling, 0.5, rng, *(None,) * 3)
        gradients = ops.lora_linear_backward(
            t["grad"], t["x"], *adapter, xa, scaling, 0.5, rng, *(None,) * 3, [True] * 6 + [False]
        )
        return y, xa, *gradients

    with backend("cpu"):
        for actual, expected in zip(both(wide), both(near), strict=True):
            assert_exact(actual, expected)


def dropped_row(row: int, x: torch.Tensor, p: float, rng: torch.Tensor) -> torch.Tensor:
    """dropout(x) of one row of a matrix whose rows are all x, in float64."""
    k, threshold = x.numel(), dropout_threshold(p)
    element = row * k + torch.arange(k)
    words = torch.stack(philox4x32(rng[0], element // 8, rng[1]))
    half = element % 8
    draws = words.gather(0, (half // 2)[None])[0] >> (half % 2 * 16) & 0xFFFF
    return torch.where(draws >= threshold, x.double() * dropout_scale(threshold), 0)


@pytest.mark.more
def test_the_mask_beyond_element_2_to_the_32() -> None:
    """One row repeated 2^20 times; what tells the rows apart is their mask alone."""
    m, k, p = 2**20, 2**12 + 8, 0.5
    assert (m - 1) * k > 2**32
    row = torch.randint(-4, 5, (k,)).float()  # sums of small integers are exact
    x, rng = row.expand(m, k), torch.tensor([7, 11])
    weight, lora_a, lora_b = torch.zeros(1, k), torch.ones(1, k), torch.ones(1, 1)
    rows = (0, 1, m // 2, m - 2, m - 1)
    dropped = {i: dropped_row(i, row, p, rng) for i in rows}
    assert len({d.sum().item() for d in dropped.values()}) > 1
    scaling = torch.ones(())
    with backend("cpu"):
        y, xa = ops.lora_linear(x, weight, lora_a, lora_b, None, scaling, p, rng, *(None,) * 3)
        for i in rows:
            assert y[i].item() == xa[i].item() == dropped[i].sum().item()
        # Only the last row has a gradient, so dA is that row's dropout(x).
        grad = torch.zeros(m, 1)
        grad[-1] = 1
        need = [False, False, True, False, False, False, False]
        dlora_a = ops.lora_linear_backward(
            grad, x, weight, lora_a, lora_b, None, scaling, p, rng, None, None, None, need
        )[2]
    assert_exact(dlora_a.double()[0], dropped[m - 1])
