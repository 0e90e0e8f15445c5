"""The prune family: figures beside torch's dense and block-sparse products; for bars.toml.

Masks are drawn block by block. Every figure gates on a correct result first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import linear

from pyfastft import ops
from pyfastft.benchmarks import probe
from pyfastft.benchmarks.measure import OURS, medians, quiet_times
from pyfastft.benchmarks.timer import Candidate, summarise
from pyfastft.pruning import BlockPattern
from pyfastft.testing.tolerance import assert_accurate

_TOKENS, _N, _K = 512, 1024, 1024
_DECODED_N, _DECODED_K = 4096, 14336
_BLOCKS = (32, 64)
_DENSITIES = {"10 %": 0.1, "25 %": 0.25, "50 %": 0.5}
# Beyond every last-level cache of today: copies of the blocks take turns until they fill it.
_ROTATION_BYTES = 512 << 20


class _Layer:
    """A weight with so many of its blocks, dense and as blocks."""

    def __init__(self, weight: torch.Tensor, block: int, density: float) -> None:
        n, k = weight.shape
        grid = (n // block, k // block)
        mask = torch.zeros(grid, dtype=torch.bool, device=weight.device)
        chosen = torch.randperm(mask.numel())[: max(1, round(density * mask.numel()))]
        mask.view(-1)[chosen.to(weight.device)] = True
        self.pattern = BlockPattern.from_mask(mask, shape=(n, k), block=(block, block))
        self.values = self.pattern.values(weight)
        self.index, self.n, self.k = self.pattern.index, n, k

    def dense(self) -> torch.Tensor:
        return self.pattern.dense(self.values)

    def forward(self, x: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        values = self.values if values is None else values
        return ops.block_sparse_linear(x, values, None, self.index, self.n)

    def input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        need = [True, False, False]
        return ops.block_sparse_linear_backward(grad, None, self.values, self.index, self.k, need)[
            0
        ]

    def values_gradient(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        need = [False, True, False]
        return ops.block_sparse_linear_backward(grad, x, self.values, self.index, self.k, need)[1]


def _lowest(found: Mapping[str, float], dense: float) -> dict[str, float]:
    """How many times faster than a dense product, of all sizes of blocks the lowest by label."""
    ratios: dict[str, float] = {}
    for name, seconds in found.items():
        label = name.partition(",")[0]
        ratios[label] = min(dense / seconds, ratios.get(label, float("inf")))
    return ratios


@torch.no_grad()
def _products(dtype: torch.dtype, device: torch.device, *, bsr: bool) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(_TOKENS, _K, device=device).to(dtype)
    grad = torch.randn(_TOKENS, _N, device=device).to(dtype)
    weight = torch.randn(_N, _K, device=device).to(dtype)
    forwards: dict[str, Callable[[], Any]] = {"dense": lambda: linear(x, weight)}
    backwards: dict[str, Callable[[], Any]] = {"dense": lambda: grad @ weight}
    for (label, density), block in itertools.product(_DENSITIES.items(), _BLOCKS):
        layer = _Layer(weight, block, density)
        w = layer.dense()
        truth, naive = linear(x.double(), w.double()), linear(x, w)
        assert_accurate(layer.forward(x), truth, naive)
        truth, naive = grad.double() @ w.double(), grad @ w
        assert_accurate(layer.input_gradient(grad), truth, naive, gradient=True)
        name = f"{label}, blocks of {block}"
        forwards[name] = lambda layer=layer: layer.forward(x)
        backwards[name] = lambda layer=layer: layer.input_gradient(grad)
    found, back = medians(forwards, dtype, device), medians(backwards, dtype, device)
    dense = found.pop("dense")
    ratios = {f"forward {k}": v for k, v in _lowest(_without_peak(found), dense).items()}
    if bsr:
        layer = _Layer(weight, 32, 0.1)
        peer = layer.dense().to_sparse_bsr((32, 32))
        pair = {OURS: lambda: layer.forward(x), "BSR": lambda: linear(x, peer)}
        both = medians(pair, dtype, device)
        ratios["over BSR 10 %"] = both["BSR"] / both[OURS]
    dense_back = back.pop("dense")
    ratios |= {f"dX {k}": v for k, v in _lowest(_without_peak(back), dense_back).items()}
    return {**ratios, "dense ms": dense * 1e3, "dense dX ms": dense_back * 1e3}


def _without_peak(found: dict[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in found.items() if name != "peak"}


def products(_: Any, device: torch.device) -> dict[str, float]:
    """y and dX, T=512, N=K=1024, float32: how many times faster than torch's dense products, of
    blocks of 32 and of 64 the slower; beside torch's product with BSR too."""
    return _products(torch.float32, device, bsr=True)


def products_bfloat16(_: Any, device: torch.device) -> dict[str, float]:
    """The same in bfloat16, in which torch has no BSR on the CPU."""
    return _products(torch.bfloat16, device, bsr=False)


@torch.no_grad()
def _gradient(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(_TOKENS, _K, device=device).to(dtype)
    grad = torch.randn(_TOKENS, _N, device=device).to(dtype)
    weight = torch.randn(_N, _K, device=device).to(dtype)
    steps: dict[str, Callable[[], Any]] = {"dense": lambda: grad.T @ x}
    for (label, density), block in itertools.product(_DENSITIES.items(), _BLOCKS):
        layer = _Layer(weight, block, density)
        truth = layer.pattern.values(grad.double().T @ x.double())
        naive = layer.pattern.values(grad.T @ x)
        assert_accurate(layer.values_gradient(grad, x), truth, naive, gradient=True)
        name = f"{label}, blocks of {block}"
        steps[name] = lambda layer=layer: layer.values_gradient(grad, x)
    found = _without_peak(medians(steps, dtype, device))
    dense = found.pop("dense")
    return {**_lowest(found, dense), "dense ms": dense * 1e3}


def gradient(_: Any, device: torch.device) -> dict[str, float]:
    """dW at the blocks, T=512, N=K=1024, float32: how many times faster than all of it by torch, of
    blocks of 32 and of 64 the slower."""
    return _gradient(torch.float32, device)


def gradient_bfloat16(_: Any, device: torch.device) -> dict[str, float]:
    """The same in bfloat16."""
    return _gradient(torch.bfloat16, device)


@torch.no_grad()
def _one_token(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    torch.manual_seed(0)
    weight = torch.randn(_DECODED_N, _DECODED_K, device=device).to(dtype)
    x = torch.randn(1, _DECODED_K, device=device).to(dtype)
    arithmetic = probe.arithmetic(dtype, device)
    reading = probe.reading(_ROTATION_BYTES, device)
    copies = _ROTATION_BYTES // (weight.numel() * weight.element_size()) + 1
    several = [weight, *(weight.clone() for _ in range(copies - 1))]
    shares: dict[str, float] = {}
    rates: dict[str, float] = {}
    for (label, density), block in itertools.product(_DENSITIES.items(), _BLOCKS):
        layer = _Layer(weight, block, density)
        w = layer.dense()
        assert_accurate(layer.forward(x), linear(x.double(), w.double()), linear(x, w))
        size = layer.values.numel() * layer.values.element_size()
        turns = [layer.values.clone() for _ in range(_ROTATION_BYTES // size + 1)]
        times, _ = quiet_times(
            {
                "arithmetic": arithmetic.candidate,
                "reading": reading.candidate,
                "dense": Candidate([lambda w=w: linear(x, w) for w in several]),
                OURS: Candidate([lambda v=v, layer=layer: layer.forward(x, v) for v in turns]),
            },
            device,
            budget_s=4.0,
            min_rounds=7,
        )
        found = {name: summarise(samples).median for name, samples in times.items()}
        rate = reading.work / found["reading"]
        best = min(found["dense"], weight.numel() * weight.element_size() / rate)
        name = f"{label}, blocks of {block}"
        shares[name] = best / found[OURS] * density
        rates[f"{name}, percent of the bandwidth"] = 100 * size / found[OURS] / rate
    return {"lowest": min(shares.values()), **shares, **rates}


def one_token(_: Any, device: torch.device) -> dict[str, float]:
    """y of one token, 4096 x 14336, float32, copies beyond the last-level cache in turns: d times
    the speed of the faster of torch's dense product and reading W; 1 is all that a density d can
    gain."""
    return _one_token(torch.float32, device)


def one_token_bfloat16(_: Any, device: torch.device) -> dict[str, float]:
    """The same in bfloat16."""
    return _one_token(torch.bfloat16, device)


FIGURES = {
    "products": products,
    "products_bfloat16": products_bfloat16,
    "gradient": gradient,
    "gradient_bfloat16": gradient_bfloat16,
    "one_token": one_token,
    "one_token_bfloat16": one_token_bfloat16,
}
