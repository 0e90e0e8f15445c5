"""The prune family on Triton beyond small samples: tiles of every size, tokens cut in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pyfastft import backend
from pyfastft._op import REGISTRY
from pyfastft.ops.prune._pattern import grid_of, index_of_mask
from pyfastft.testing.samples import flat, upcast
from pyfastft.testing.tolerance import assert_accurate
from pyfastft.triton_kernels import prune
from pyfastft.triton_kernels._plan import Device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(m: int, n: int, k: int, block: tuple[int, int], dtype: torch.dtype) -> None:
    index = index_of_mask(torch.rand(grid_of(n, k, *block)) < 0.6).to(DEVICE)
    blocks = (index.shape[0] - 2 * (sum(grid_of(n, k, *block)) + 1)) // 3
    x, grad = (torch.randn(m, size, device=DEVICE).to(dtype) for size in (k, n))
    values = torch.randn(blocks, *block, device=DEVICE).to(dtype)
    calls: dict[str, tuple[Any, ...]] = {
        "block_sparse_linear": (x, values, None, index, n),
        "block_sparse_linear_backward": (grad, x, values, index, k, [True] * 3),
    }
    for op, args in calls.items():
        with backend("triton"):
            actual = flat(REGISTRY[op](*args))
        with backend("reference"):
            naive, truth = flat(REGISTRY[op](*args)), flat(REGISTRY[op](*upcast(args)))
        for a, t, e in zip(actual, truth, naive, strict=True):
            assert_accurate(a, t, e, gradient=op.endswith("_backward"), what=f"{op} {block}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(128, 64), (16, 128), (64, 32)], ids=str)
def test_blocks_of_several_tiles(block: tuple[int, int], dtype: torch.dtype) -> None:
    check(70, 150, 140, block, dtype)


def test_tokens_are_cut_where_blocks_fill_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "device_of", lambda tensor: Device(40, (9, 0)))
    for dtype in (torch.float32, torch.float16):
        check(300, 40, 50, (32, 16), dtype)


def test_tiles_lie_within_a_block() -> None:
    for half in (True, False):
        for edge in prune.EDGES:
            for other in prune.EDGES:
                for m in (1, 17, 5000):
                    for aligned in (True, False):
                        tile = prune.product_tile(m, edge, other, half=half, aligned=aligned)
                        assert edge % tile.lines == other % tile.depth == 0
                        assert tile.tokens >= 16
                tile = prune.gradient_tile(edge, other, half=half)
                assert edge % tile.lines == other % tile.depth == 0
