"""Which modules a config means: PEFT's rules, with a reason for each module left alone."""

from __future__ import annotations

import difflib
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import nn

from pyfastft._report import leaf
from pyfastft.config import ALL_LINEAR, Targeted
from pyfastft.nn._adapters import why_not
from pyfastft.nn._layer import LoRALayer
from pyfastft.nn.int4 import Int4Linear
from pyfastft.nn.lora import is_conv1d


@dataclass(frozen=True)
class Plan:
    """The modules to change by name, as they are without an adapter, and why others are not."""

    modules: dict[str, nn.Module]
    skipped: dict[str, str]


def plan(
    model: nn.Module,
    config: Targeted,
    *,
    strict: bool = True,
    caller: str = "convert",
    why_not: Callable[[nn.Module], str | None] = why_not,
) -> Plan:
    """What a conversion of the model would do.

    Args:
        strict: let every single target match a module, not just one of them.
        caller: what errors begin with.
        why_not: says why a module cannot be changed, or None where it can.

    Raises:
        ValueError: nothing would be converted, or a target names nothing; suggests near names.
    """
    named = {name: _without_adapter(module) for name, module in model.named_modules() if name}
    targets, skipped = _resolve(model, named, config.targets)
    if strict:
        _expect_each_to_match(caller, config.targets, named)
    parents = {name: named.get(name.rpartition(".")[0], model) for name in named}
    modules = {}
    for name, module in named.items():
        if not names_module(targets, name):
            continue
        if config.exclude and names_module(config.exclude, name):
            skipped[name] = "excluded"
        elif not isinstance(targets, str) and not in_layers(config, targets, name):
            skipped[name] = f"not in layers {config.layers}"
        elif why := why_not(module) or _is_bypassed(parents[name], module):
            skipped[name] = why
        else:
            modules[name] = module
    if not modules:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5])
        got = f"none among {len(skipped)} matches ({reasons})" if skipped else "no match"
        raise ValueError(
            f"{caller}: expected targets of modules that can be changed, got {got}" + _common(named)
        )
    return Plan(modules, skipped)


def untied(
    model: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules whose weights nothing but them has, and why not the others."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((f"{owner}.{name}", module))
    targeted = {id(module) for module in modules.values()}
    kept, skipped = {}, {}
    for name, module in modules.items():
        sharing = owners[id(module._parameters["weight"])]
        strangers = [
            owner
            for owner, other in sharing
            if id(other) not in targeted or type(other) is not type(module)
        ]
        if strangers:
            skipped[name] = f"its weight is {strangers[0]} too"
        else:
            kept[name] = module
    return kept, skipped


def names_module(targets: str | Collection[str], name: str) -> bool:
    """A string matches the whole name; one of several is the name or its end after a dot."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def in_layers(config: Targeted, targets: Collection[str], name: str) -> bool:
    """Whether the module's layer is one of ``config.layers``.

    A target that is the whole name is meant whatever its layer.
    """
    layers = (config.layers,) if isinstance(config.layers, int) else config.layers
    if not layers or name in targets:
        return True
    patterns = config.layers_pattern or ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    # The first index in the name is the layer's; later ones are, say, those of experts.
    expressions = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in patterns] or [
        r".*?\.[^.]*\.(?P<index>\d+)\."
    ]
    for expression in expressions:
        if found := re.match(expression, name):
            return int(found["index"]) in layers
    return False


def selects_exactly(config: Targeted, model: nn.Module, names: Collection[str]) -> bool:
    """Whether the config's own words mean these modules and no others, by the rules alone."""
    targets = config.targets
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return False
    meant = {
        name
        for name, _ in model.named_modules()
        if name
        and names_module(targets, name)
        and not (config.exclude and names_module(config.exclude, name))
        and (isinstance(targets, str) or in_layers(config, targets, name))
    }
    return meant == set(names)


def _without_adapter(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, LoRALayer) else module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Int4Linear) or is_conv1d(module)


def _resolve(
    model: nn.Module, named: dict[str, nn.Module], targets: str | Collection[str]
) -> tuple[str | Collection[str], dict[str, str]]:
    """The targets with ``"all-linear"`` spelt out, and what that leaves out."""
    if not (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return targets, {}
    linear = {name for name, module in named.items() if _is_linear(module)}
    head = _output_head(model)
    skipped = {
        name: "the output head, which all-linear leaves out"
        for name in linear
        if head is not None and named[name] is head
    }
    return frozenset(linear - skipped.keys()), skipped


def _output_head(model: nn.Module) -> nn.Module | None:
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    return None if head is None else _without_adapter(head)


def _is_bypassed(parent: nn.Module, module: nn.Module) -> str | None:
    """Why the parent computes with the module's weight and never calls the module, if so."""
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and does not call it"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight in inference and does not call it"
    return None


def _expect_each_to_match(
    caller: str, targets: str | Collection[str], named: dict[str, nn.Module]
) -> None:
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return
    for target in (targets,) if isinstance(targets, str) else targets:
        if any(names_module(target if isinstance(targets, str) else (target,), n) for n in named):
            continue
        candidates = dict.fromkeys(part for name in named for part in (leaf(name), name))
        near = difflib.get_close_matches(target, candidates, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"{caller}: expected targets of names in the model, got {target!r}{hint}"
            + _common(named)
        )


def _common(named: dict[str, nn.Module]) -> str:
    counts = Counter(leaf(name) for name, module in named.items() if _is_linear(module))
    if not counts:
        return "; the model holds no linear layers"
    common = ", ".join(f"{name} ({number})" for name, number in counts.most_common(5))
    return f"; its most common linear layers are {common}"
