"""Which entries of a model's weights its loss moves most, summed over some batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from pyfastft._check import reject
from pyfastft.functional import masked as functional
from pyfastft.sparsity.selection import group_scores, select_groups
from pyfastft.sparsity.set import SparseSet

Loss = Callable[[Any, Any], torch.Tensor]

_OP = "convert"


def select_by_gradient(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    loss: Loss | None,
    *,
    density: float,
    passes: int = 1,
    layout: str = "element",
    block: int = 1,
) -> dict[str, SparseSet]:
    r"""The entries of the largest :math:`|\sum_b \partial L_b / \partial w|` of all weights.

    A pass sums the gradients of a share of the weights in float32, layer by layer as the backward
    reaches them, and keeps of it no more than could be chosen. Every pass draws the same random
    numbers, so that the choice does not depend on their number. The model keeps its mode, its
    gradients and what of it trains.

    Args:
        weights: parameters of the model, distinct, by name.
        batches: what the loss is of; read once in every pass.
        loss: of the model and a batch; absent, ``model(**batch).loss``.
        density: the part of the entries of all weights that the loss depends on.
        passes, layout, block: as of :class:`pyfastft.MaskedTuning`.

    Returns:
        A set for each weight that the loss depends on.

    Raises:
        ValueError, TypeError: there is no batch, a loss is no number, a gradient is not finite, or
            there are several passes and the batches can be read only once.
    """
    if passes > 1 and isinstance(batches, Iterator):
        because = f"to be read {passes} times"
        reject(_OP, "calibration", "a list or a loader", type(batches).__name__, because=because)
    total = sum(weight.numel() for weight in weights.values())
    count = round(density * total)
    devices = {weight.device for weight in weights.values()}
    cuda = [device for device in devices if device.type == "cuda"]
    kept: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    with torch.random.fork_rng(cuda):
        state = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in cuda]
        for share in _shares(weights, min(passes, len(weights))):
            torch.set_rng_state(state[0])
            for device, own in zip(cuda, state[1], strict=True):
                torch.cuda.set_rng_state(own, device)
            sums = _summed_gradients(model, share, batches, loss)
            if layout == "element":
                kept.update(_candidates(sums, count))
            else:
                kept.update((n, (group_scores(s, layout, block), None)) for n, s in sums.items())
    reached = {name: weights[name] for name in weights if name in kept}
    if not reached:
        reject(_OP, "loss", "a number that depends on a targeted weight", "another")
    count = round(density * sum(weight.numel() for weight in reached.values()))
    scores = [kept[name][0] for name in reached]
    if layout != "element":
        sets = select_groups(list(reached.values()), scores, count, layout, block)
        return dict(zip(reached, sets, strict=True))
    found = functional.select_topk(scores, count)
    sets = []
    for (name, weight), places in zip(reached.items(), found, strict=True):
        offsets = kept[name][1]
        assert offsets is not None
        sets.append(SparseSet(weight, offsets[places]))
    return dict(zip(reached, sets, strict=True))


def _shares(weights: Mapping[str, nn.Parameter], number: int) -> list[dict[str, nn.Parameter]]:
    """The weights in that many runs of about equal size, in order."""
    total = sum(weight.numel() for weight in weights.values())
    shares: list[dict[str, nn.Parameter]] = [{} for _ in range(number)]
    before = 0
    for name, weight in weights.items():
        middle = before + weight.numel() / 2
        shares[min(number - 1, int(number * middle / max(total, 1)))][name] = weight
        before += weight.numel()
    return [share for share in shares if share]


def _candidates(
    sums: Mapping[str, torch.Tensor], count: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of these gradients what could be among the ``count`` best of all, and where it stands."""
    if not sums:
        return {}
    size = sum(one.numel() for one in sums.values())
    found = functional.select_topk(list(sums.values()), min(count, size))
    return {
        name: (one.view(-1)[offsets], offsets)
        for (name, one), offsets in zip(sums.items(), found, strict=True)
    }


def _summed_gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Iterable[Any], loss: Loss | None
) -> dict[str, torch.Tensor]:
    """The float32 sum over the batches of each weight's gradient, where the loss depends on it."""
    sums: dict[nn.Parameter, torch.Tensor] = {}

    def add(weight: torch.Tensor) -> None:
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        grad, weight.grad = weight.grad, None
        if weight in sums:
            sums[weight].add_(grad)
        else:
            sums[weight] = grad.to(torch.float32, memory_format=torch.contiguous_format)

    parameters = list(model.parameters())
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    hooks = []
    seen = False
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
            hooks.append(weight.register_post_accumulate_grad_hook(add))
        for batch in tqdm(batches, desc="calibrate", unit="batch", disable=None):
            with torch.enable_grad():
                value = _loss_of(model, batch, loss)
            if value.requires_grad:  # not so where none of this pass's weights is reached
                value.backward()
            seen = True
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad
    if not seen:
        reject(_OP, "calibration", "one batch or more", "none")
    for name, weight in weights.items():
        if weight in sums and not bool(sums[weight].isfinite().all()):
            reject(_OP, "calibration", "finite gradients", f"others in {name}")
    return {name: sums[weight] for name, weight in weights.items() if weight in sums}


def _loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> torch.Tensor:
    if loss is not None:
        found: Any = loss(model, batch)
    elif isinstance(batch, Mapping):
        found = getattr(model(**batch), "loss", None)
    else:
        because = "where the batches are no mappings of arguments"
        reject(_OP, "loss", "a function", "None", because=because, error=TypeError)
    if not isinstance(found, torch.Tensor):
        reject(_OP, "loss", "type Tensor", type(found).__name__, error=TypeError)
    if found.numel() != 1:
        reject(_OP, "loss", "one number", f"shape {tuple(found.shape)}")
    return found
