"""The masked family: figures beside what PyTorch does today; for bars.toml.

The peers are PyTorch's own: the fused dense AdamW, ``torch.topk`` of a score tensor, the dense
gradient of the weight. Every figure gates on a correct result first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyfastft as ft
from pyfastft import optim, sparsity
from pyfastft._check import name_of
from pyfastft.benchmarks.masked import model
from pyfastft.benchmarks.measure import OURS, medians
from pyfastft.functional import masked as functional
from pyfastft.ops.masked._rectangles import offsets_of
from pyfastft.testing.tolerance import assert_accurate, assert_exact

_PARAMETERS = 1 << 24
_SIDE = 1 << 12
_DENSITIES = {"0.1 %": 0.001, "1 %": 0.01, "10 %": 0.1}
_TOKENS, _N, _K = 2048, 1024, 1024


def masked_step(_: Any, device: torch.device) -> dict[str, float]:
    """A step of MaskedAdamW on random elements: how many times faster than torch's fused AdamW of
    all. The dense steps in between empty the caches."""
    torch.manual_seed(0)
    dense = torch.nn.Parameter(torch.randn(_SIDE, _SIDE, device=device) * 0.02)
    dense.grad = torch.randn_like(dense) * 1e-3
    peer = torch.optim.AdamW([dense], lr=1e-5, fused=True)
    steps: dict[str, Callable[[], Any]] = {"dense": peer.step}
    held = []
    for label, density in _DENSITIES.items():
        weight = dense.detach().clone()
        one = sparsity.select([weight], density, score="random")[0]
        one.values.grad = dense.grad.view(-1)[one.offsets()]
        optimizer = optim.MaskedAdamW([one], lr=1e-5)
        _gate_step(one, optimizer)
        held.append(one)
        steps[label] = optimizer.step
    found = medians(steps, torch.float32, device)
    ratios = {label: found["dense"] / found[label] for label in _DENSITIES}
    return {**ratios, **{f"{name} ms": found[name] * 1e3 for name in steps}}


def _gate_step(one: sparsity.SparseSet, optimizer: torch.optim.Optimizer) -> None:
    """One step is torch's on the gathered values, and nothing else moved."""
    before, start = one.weight.clone(), one.values.detach().clone()
    peers = []
    for dtype in (torch.float64, torch.float32):
        leaf = start.to(dtype, copy=True).requires_grad_()
        leaf.grad = one.values.grad.to(dtype)
        torch.optim.AdamW([leaf], lr=1e-5).step()
        peers.append(leaf.detach())
    optimizer.step()
    assert_accurate(one.values.detach(), *peers, gradient=True)
    before.view(-1)[one.offsets()] = one.values.detach()
    assert_exact(one.weight, before)


def selection(_: Any, device: torch.device) -> dict[str, float]:
    """The top 1 % of the magnitudes of 16 M: how many times faster than torch.topk of the
    magnitudes, which are made before."""
    torch.manual_seed(0)
    tensor = torch.randn(_SIDE, _SIDE, device=device)
    scores, k = tensor.abs().view(-1), _PARAMETERS // 100
    found = functional.select_topk(tensor, k)[0]
    order = torch.sort(scores, descending=True, stable=True).indices[:k]
    assert_exact(found, order.sort().values, "the entries selected")
    times = medians(
        {OURS: lambda: functional.select_topk(tensor, k), "topk": lambda: scores.topk(k)},
        torch.float32,
        device,
    )
    return {"topk": times["topk"] / times[OURS], "ms": times[OURS] * 1e3}


def _draw(n: int, k: int, rows: int, columns: int, density: float) -> torch.Tensor:
    across = k // columns
    total = n // rows * across
    places = torch.randperm(total)[: max(1, round(density * total))].sort().values
    return (places // across * rows * k + places % across * columns).int()


_LAYOUTS = {
    "rows 10 %": (1, _K, 0.1),
    "columns 10 %": (_N, 1, 0.1),
    "blocks(64) 10 %": (64, 64, 0.1),
    "elements 0.1 %": (1, 1, 0.001),
    "elements 1 %": (1, 1, 0.01),
    "elements 10 %": (1, 1, 0.1),
    "elements 50 %": (1, 1, 0.5),
}


def _weight_gradient(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    torch.manual_seed(0)
    grad = torch.randn(_TOKENS, _N, device=device).to(dtype)
    x = torch.randn(_TOKENS, _K, device=device).to(dtype)
    truth = (grad.double().T @ x.double()).view(-1)
    naive = (grad.T @ x).view(-1)
    steps: dict[str, Callable[[], Any]] = {"dense": lambda: grad.T @ x}
    for label, (rows, columns, density) in _LAYOUTS.items():
        index = _draw(_N, _K, rows, columns, density).to(device)

        def ours(index: torch.Tensor = index, size: tuple[int, int] = (rows, columns)) -> Any:
            return functional.masked_weight_grad(grad, x, index, rows=size[0], columns=size[1])

        at = offsets_of(index, rows, columns, _K)
        assert_accurate(ours(), truth[at], naive[at].float(), gradient=True, what=label)
        steps[label] = ours
    found = medians(steps, dtype, device)
    ratios = {label: found["dense"] / found[label] for label in _LAYOUTS}
    return {**ratios, "dense ms": found["dense"] * 1e3}


def weight_gradient(_: Any, device: torch.device) -> dict[str, float]:
    """dW at the trained entries, T=2048, N=K=1024, float32: how many times faster than all of it
    by torch."""
    return _weight_gradient(torch.float32, device)


def weight_gradient_bfloat16(_: Any, device: torch.device) -> dict[str, float]:
    """The same in bfloat16."""
    return _weight_gradient(torch.bfloat16, device)


def frozen(_: Any, device: torch.device) -> dict[str, float]:
    """Frozen entries whose bits changed over 200 steps with decay, momentum, accumulation, clipping
    and autocast."""
    torch.manual_seed(0)
    changed = 0
    for kind in (optim.MaskedAdamW, optim.MaskedSGD, optim.MaskedLion):
        options = {"momentum": 0.9} if kind is optim.MaskedSGD else {}
        weights = [torch.randn(64, 48, device=device), torch.randn(32, 64, device=device)]
        before = [weight.clone() for weight in weights]
        sets = sparsity.select(weights, 0.05)
        optimizer = kind(sets, lr=1e-3, weight_decay=0.1, **options)
        for _step in range(200):
            optimizer.zero_grad()
            for _part in range(2):
                with torch.autocast(device.type, torch.bfloat16):
                    x = torch.randn(16, 48, device=device)
                    loss = sets[1].linear(sets[0].linear(x).relu()).square().mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_([one.values for one in sets], 0.5)
            optimizer.step()
        for one, old in zip(sets, before, strict=True):
            differs = one.weight.view(torch.int32) != old.view(torch.int32)
            changed += int((differs & ~one.mask()).sum())
            assert bool(differs[one.mask()].any()), "nothing trained"
    return {"changed": float(changed)}


def delta_size(_: Any, device: torch.device) -> dict[str, float | str]:
    """Bytes of a delta's file for each trained weight, 1 % of 16 M at random: the trained bits of
    bfloat16 and of float32, and float32's differences in bfloat16. PEFT's SHiRA beside them, with
    1 % of one layer; of its file the tensors alone."""
    torch.manual_seed(0)
    found: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task"
        for dtype in (torch.bfloat16, torch.float32):
            weight = torch.randn(_SIDE, _SIDE, device=device).to(dtype)
            base = {"weight": weight.clone()}
            one = sparsity.select([weight], 0.01, score="random")[0]
            one.write(torch.randn(len(one), device=device))
            delta = ft.Delta.of({"weight": one})
            ft.save_delta(delta, path)
            found[name_of(dtype)] = path.stat().st_size / len(one)
            start = base["weight"].clone()
            back = ft.load_delta(path).apply(base)
            assert_exact(base["weight"], weight)
            back.apply(base)
            assert_exact(base["weight"], start)
        ft.save_delta(delta.difference(base), path, dtype=torch.bfloat16)
        found["differences"] = path.stat().st_size / len(one)
        try:
            found["SHiRA"] = _shira_size(Path(folder))
        except ImportError as error:
            found["SHiRA"] = f"cannot be used: {error}"
    return found


def _shira_size(folder: Path) -> float:
    import peft

    rank = 5
    config = peft.ShiraConfig(r=rank, target_modules=["0"])
    layer = torch.nn.Linear(_K, _N, bias=False)
    peft.get_peft_model(torch.nn.Sequential(layer), config).save_pretrained(str(folder))
    return (folder / "adapter_model.safetensors").stat().st_size / (rank * (_K + _N))


FIGURES = {
    "masked_step": masked_step,
    "selection": selection,
    "weight_gradient": weight_gradient,
    "weight_gradient_bfloat16": weight_gradient_bfloat16,
    "frozen": frozen,
    "delta_size": delta_size,
    "step_memory": model.step_memory,
    "saved_inputs": model.saved_inputs,
    "dense_gradients": model.dense_gradients,
    "frozen_model": model.frozen_model,
}
