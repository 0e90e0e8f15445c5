"""A training step of a real model of which some entries train: what it keeps and what it allocates.

MiniLM's encoder, its linear layers but the pooler's, which no output depends on.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyfastft as ft
from pyfastft.benchmarks.methods import minilm

_SENTENCES, _TOKENS = 32, 64  # no weight has the shape of the activations
_STEPS, _SMALL = 200, (2, 8)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A loss that every layer has a part in."""
    hidden = model(input_ids=ids).last_hidden_state.float()
    return (hidden * torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device).sin()).mean()


def encoder() -> Any:
    """MiniLM without its pooler, training."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(
        minilm(), local_files_only=True, dtype=torch.float32, add_pooling_layer=False
    ).train()


def tokens(sentences: int, length: int) -> torch.Tensor:
    """Random words, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, 20000, (sentences, length), generator=generator)


def tuned(base: Any, **options: Any) -> Any:
    """A copy with a part of its weights chosen by SAFT on one small batch."""
    model = copy.deepcopy(base)
    torch.manual_seed(0)  # the choice is made with dropout
    config = ft.MaskedTuning(**options)
    ft.convert(model, config, calibration=[tokens(*_SMALL)], loss=loss_of)
    return model


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Gradients, the optimizer's state, and what sets keep beside the weights."""
    states = itertools.chain(*(state.values() for state in optimizer.state.values()))
    grads = sum(p.grad.nbytes for p in _trained(model) if p.grad is not None)
    sets = ft.sparsity.sets_of(model).values()
    return grads + sum(t.nbytes for t in states) + sum(one.nbytes for one in sets)


def step_memory(_: Any, device: torch.device) -> dict[str, float]:
    """A step of 32 x 64 tokens: gradients, state, indices and masters with 1 % trained, in percent
    of what training all weights, or those layers' alone, keeps."""
    base = encoder().to(device)
    ids = tokens(_SENTENCES, _TOKENS).to(device)
    layers = copy.deepcopy(base).requires_grad_(False)
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(True)
    kept = {}
    for name, model, make in (
        ("masked", tuned(base, density=0.01), ft.optim.MaskedAdamW),
        ("all", base, torch.optim.AdamW),
        ("layers", layers, torch.optim.AdamW),
    ):
        optimizer = make(_trained(model))
        loss_of(model, ids).backward()
        optimizer.step()
        kept[name] = _state_bytes(model, optimizer)
    ours = kept["masked"]
    return {
        "percent": 100 * ours / kept["all"],
        "percent of the layers'": 100 * ours / kept["layers"],
        "MB": ours / 1e6,
    }


def saved_bytes(model: Any, ids: torch.Tensor) -> tuple[int, int]:
    """What the linear layers save for the backward, parameters left out: memory that several save
    once, and what each saves summed."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    summed = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal summed
        place = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and place not in own:
            found[place] = tensor.untyped_storage().nbytes()
            summed += tensor.nbytes
        return tensor

    contexts: list[Any] = []
    handles = []

    def enter(*_: Any) -> None:
        contexts.append(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        contexts[-1].__enter__()

    def leave(*_: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    for module in model.modules():
        if isinstance(module, nn.Linear | ft.nn.MaskedLinear):
            handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            ]
    # What was saved stays alive until the loss does not: no memory is given out twice.
    loss = loss_of(model, ids)
    for handle in handles:
        handle.remove()
    loss.backward()
    return sum(found.values()), summed


def saved_inputs(_: Any, device: torch.device) -> dict[str, float]:
    """What the linear layers save of 32 x 64 tokens, in percent of full fine-tuning: 1 % of the
    entries, and every tenth column of each layer. In memory, which several layers may save once,
    and summed over layers."""
    base = encoder().to(device)
    ids = tokens(_SENTENCES, _TOKENS).to(device)
    shared, summed = saved_bytes(base, ids)
    columns = copy.deepcopy(base).requires_grad_(False)
    for parent in list(columns.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear):
                every_tenth = range(0, module.in_features, 10)
                one = ft.sparsity.columns(module.weight, every_tenth)
                setattr(parent, name, ft.nn.MaskedLinear(module, one))
    found = {}
    for label, model in (
        ("1 % of entries", tuned(base, density=0.01)),
        ("10 % of columns", columns),
    ):
        ours, ours_summed = saved_bytes(model, ids)
        found[label] = 100 * ours / shared
        found[f"{label}, summed"] = 100 * ours_summed / summed
    return found


class _Allocations(TorchDispatchMode):
    """Counts the tensors of some shapes that operators make in new memory."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.count = frozenset(shapes), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        places = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) in self.shapes:
                self.count += tensor.untyped_storage().data_ptr() not in places
        return made


def dense_gradients(_: Any, device: torch.device) -> dict[str, float]:
    """How many tensors of a weight's shape the backward and the step make, 1 % of the entries
    trained; beside it those of full fine-tuning."""
    base = encoder().to(device)
    ids = tokens(_SENTENCES, _TOKENS).to(device)
    shapes = {tuple(m.weight.shape) for m in base.modules() if isinstance(m, nn.Linear)}
    shapes |= {shape[::-1] for shape in shapes}
    found = {}
    for name, model, make in (
        ("masked", tuned(base, density=0.01), ft.optim.MaskedAdamW),
        ("full", base, torch.optim.AdamW),
    ):
        optimizer = make(_trained(model))
        loss = loss_of(model, ids)
        with _Allocations(list(shapes)) as allocations:
            loss.backward()
            optimizer.step()
        found[name] = float(allocations.count)
    return found


def frozen_model(_: Any, device: torch.device, steps: int = _STEPS) -> dict[str, float]:
    """Weights of the model that no set has and whose bits changed over 200 steps with decay,
    momentum, accumulation, clipping and autocast, SAFT's and SaRA's choice."""
    changed = 0
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "saft": ft.optim.MaskedAdamW,
        "sara": lambda p, **o: ft.optim.MaskedSGD(p, momentum=0.9, **o),
    }
    for method, make in kinds.items():
        model = encoder().to(device)
        before = copy.deepcopy(model.state_dict())
        config = ft.MaskedTuning(method=method, density=0.01)  # type: ignore[arg-type]
        data = {"calibration": [tokens(*_SMALL)], "loss": loss_of} if method == "saft" else {}
        ft.convert(model, config, **data)  # type: ignore[arg-type]
        masks = {name: one.mask() for name, one in ft.sparsity.sets_of(model).items()}
        optimizer = make(_trained(model), lr=1e-3, weight_decay=0.1)
        for step in range(steps):
            ids = tokens(*_SMALL).roll(step).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                (loss_of(model, ids) / 2).backward()
            if step % 2:
                nn.utils.clip_grad_norm_(_trained(model), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        ft.revert(model)
        for name, value in model.state_dict().items():
            differs = value != before[name]
            if name in masks:
                assert bool(differs.any()), f"{name} did not train"
                differs &= ~masks[name]
            changed += int(differs.sum())
    return {"changed": float(changed)}
