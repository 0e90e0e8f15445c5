"""Several projections and several adapters around torch's GEMM: which stages run, how often, and
what they are accurate to. The whole ops run on every sample in test_registry.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pyfastft._op import REGISTRY, backend
from pyfastft._random import dropout_threshold
from pyfastft.native import _torch_gemm_lists
from pyfastft.native._torch_gemm_lists import Masks, SeveralStages
from pyfastft.reference._dropout import dropout
from pyfastft.reference.lora.projections import stream
from pyfastft.testing.samples import upcast
from pyfastft.testing.tolerance import assert_accurate, assert_exact
from pyfastft.triton_kernels import _plan
from pyfastft.triton_kernels._common import INTERPRETED
from pyfastft.triton_kernels.lora.projections import ProjectionStages

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
GPU = _plan.Device(multiprocessors=2, capability=(8, 0))
PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither a GPU nor the interpreter"
)


def rng() -> torch.Tensor:
    # The seeds of later projections pass the largest number.
    return torch.tensor([(1 << 63) - 2, 1 << 33], device=DEVICE)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


class Counting(ProjectionStages):
    """Triton's stages, counted."""

    def __init__(self) -> None:
        super().__init__(GPU)
        self.calls: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name in ("down", "up", "up_grad", "down_grad", "dx", "dx_of_all"):
            self.calls[name] += 1
        return super().__getattribute__(name)


def layers(
    m: int, n: list[int], k: int, r: list[int], p: list[float], dtype: torch.dtype
) -> tuple[Any, ...]:
    """Arguments of lora_projections without biases."""
    return (
        drawn(m, k, dtype=dtype),
        [(drawn(one, k) / k**0.5).to(dtype) for one in n],
        [(drawn(one, k) / k**0.5).to(dtype) for one in r],
        [drawn(*size, dtype=dtype) for size in zip(n, r, strict=True)],
        [drawn(0, dtype=dtype) for _ in n],
        [torch.tensor(0.5 + j, device=DEVICE) for j in range(len(n))],
        p,
        rng() if any(p) else None,
        [],
        [],
    )


def gradient_arguments(forward: tuple[Any, ...], need: list[bool]) -> tuple[Any, ...]:
    x, weights, a, b, _, scaling, p, generator, *packed = forward
    with backend("reference"):
        xas = REGISTRY["lora_projections"](*forward)[1]
    grads = [drawn(len(x), len(w), dtype=x.dtype) for w in weights]
    return grads, x, weights, a, b, xas, scaling, p, generator, *packed, need


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_shared_runs_once(p: float) -> None:
    """Where nothing is dropped, x is read once each way; dx is updated once in any case."""
    forward = layers(5, [8, 16, 24], 40, [4, 4, 4], [p] * 3, torch.float32)
    stages = Counting()
    outputs = REGISTRY["lora_projections"].contract(*forward)
    _torch_gemm_lists.projections_forward(stages, *outputs, *forward)
    reads = 3 if p else 1
    assert stages.calls == {"down": reads, "up": 3}

    stages.calls.clear()
    backward = gradient_arguments(forward, [True, *[False, True, True, False, False] * 3])
    outputs = REGISTRY["lora_projections_backward"].contract(*backward)
    _torch_gemm_lists.projections_backward(stages, *outputs, *backward)
    update = {"dx_of_all": 1} if p else {"dx": 1}
    assert stages.calls == {"up_grad": 3, "down_grad": reads, **update}


@pytest.mark.parametrize("width", [40, 37], ids=["grouped", "element"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_dx_of_all(width: int, precision: str) -> None:
    base, adapter = PRECISIONS[precision]
    m, r, count, p = 67, 20, 3, 0.3
    ts = [drawn(m, r) for _ in range(count)]
    lora_a = [drawn(r, width, dtype=adapter) for _ in range(count)]
    scaling = [torch.tensor([0.5 + j], device=DEVICE) for j in range(count)]
    before = drawn(m, width, dtype=base)
    masks = Masks([p] * count, rng())
    operands = {"ts": ts, "lora_a": lora_a, "scaling": scaling, "masks": masks}
    together, apart = before.clone(), before.clone()
    stages = Counting()
    stages.dx_of_all(dx=together, **operands)
    assert stages.calls["dx"] == 0
    SeveralStages.dx_of_all(stages, dx=apart, **operands)
    assert stages.calls["dx"] == count
    truth, naive = before.double(), before
    for j in range(count):
        own = scaling[j].double() * ts[j].double() @ lora_a[j].double()
        truth = truth + dropout(own, p, stream(rng(), j))
        own = (scaling[j] * ts[j]).to(adapter) @ lora_a[j]
        naive = naive + dropout(own, p, stream(rng(), j)).to(base)
    assert_accurate(together, truth, naive, gradient=True, what="together")
    assert_accurate(apart, truth, naive, gradient=True, what="apart")


@pytest.mark.parametrize("ranks", [[4, 4, 4], [4, 2, 3]], ids=["alike", "unlike"])
@pytest.mark.parametrize("count", [3, 8])
def test_a_sum_over_projections_is_as_accurate_as_theirs(ranks: list[int], count: int) -> None:
    """dX in half precision, added up in place and, where there are many, in one product."""
    r = (ranks * 3)[:count]
    forward = layers(40, [24] * count, 48, r, [0.1] * count, torch.bfloat16)
    args = gradient_arguments(forward, [True, *[False] * 5 * count])
    with backend("reference"):
        truth, naive = (REGISTRY["lora_projections_backward"](*a)[0] for a in (upcast(args), args))
    with backend("triton"):
        dx = REGISTRY["lora_projections_backward"](*args)[0]
    assert_accurate(dx, truth, naive, gradient=True)


def test_masks_are_those_of_the_reference() -> None:
    p = [0.0, 0.25, 0.5]
    masks = Masks(p, rng())
    assert masks.thresholds == [dropout_threshold(one) for one in p]
    for j in range(3):
        assert_exact(masks.stream(j), stream(rng(), j))
    assert Masks([0.0, 0.0], rng()).streams is None
    assert Masks([0.3], None).thresholds == [0]


def test_rows_of_no_adapter_are_those_of_the_base() -> None:
    x, weight = drawn(9, 24), drawn(16, 24)
    a, b = [drawn(4, 24) for _ in range(2)], [drawn(16, 4) for _ in range(2)]
    s = [torch.tensor(1.0, device=DEVICE)] * 2
    args = (x, weight, a, b, None, s, [0.1, 0.2], [3, 2], rng(), None, None)
    with backend("triton"):
        y = REGISTRY["lora_adapters"](*args)[0]
    assert_exact(y[5:], (x @ weight.T)[5:])
    assert not bool((y[:5] == (x @ weight.T)[:5]).any())
