"""Converting a model in place to train a small part of it, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pyfastft import tuning
from pyfastft._check import reject
from pyfastft._modules import adapters, expect_unconverted, replace
from pyfastft._report import Report, report
from pyfastft._targets import Plan, plan
from pyfastft.config import LoRA, MaskedTuning
from pyfastft.nn._adapters import layer_for
from pyfastft.nn._layer import LoRALayer
from pyfastft.nn.lora import LoRALinear
from pyfastft.pruning import compaction
from pyfastft.quantization import model as quantization

__all__ = ["Report", "convert", "merge", "pack", "revert", "unmerge", "unpack"]

_RECORD = "_pyfastft_conversion"


@dataclass(frozen=True)
class Conversion:
    """What a converted model remembers: its config, and what trained before."""

    config: LoRA
    requires_grad: dict[str, bool]


def convert(
    model: nn.Module,
    config: LoRA | MaskedTuning,
    *,
    calibration: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
) -> Report:
    """Give every targeted layer what trains, in place, and freeze the rest.

    With :class:`pyfastft.LoRA` each linear layer becomes a :class:`pyfastft.nn.LoRALinear` over its
    own parameters, each convolution and embedding its like; afterwards only the adapters train, and
    the biases that ``config.bias`` names. With :class:`pyfastft.MaskedTuning` each linear layer
    with a chosen entry becomes a :class:`pyfastft.nn.MaskedLinear`, and only the chosen entries
    train: ``values``, which an optimizer of :mod:`pyfastft.optim` steps together with their
    weights::

        ft.convert(model, ft.MaskedTuning(method="saft", density=1e-3), calibration=batches)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = ft.optim.MaskedAdamW(trained, lr=1e-4)

    A layer that stands in several places is converted once and stays shared. Layers that share one
    weight train one set of it; where something else has the weight too, they are left alone.

    Args:
        model: any module, not itself such a layer.
        config: which layers, and how.
        calibration: the batches that ``"saft"`` chooses by; on several ranks the same on each.
        loss: of the model and a batch; by default ``model(**batch).loss``.

    Returns:
        What was converted, and what was targeted and skipped, with the reasons.

    Raises:
        ValueError: nothing would be converted; a target matches nothing, with the nearest names;
            the model was converted already, which :func:`revert` undoes; or the calibration has no
            batch, or a gradient that is not finite.
        TypeError: the config is none; or the calibration or the loss is missing, or no tensor.
    """
    if isinstance(config, MaskedTuning):
        return tuning.tune(model, config, calibration, loss)
    if not isinstance(config, LoRA):
        what = "LoRA or MaskedTuning"
        raise TypeError(f"convert: expected config of type {what}, got {type(config).__name__}")
    if calibration is not None or loss is not None:
        because = "where adapters are put on, which look at no data"
        reject("convert", "calibration and loss", "None", "others", because=because)
    expect_unconverted(model, "convert")
    planned = plan(model, config)
    layers = build(config, planned)
    install(model, config, layers)
    return report("convert", model, layers, planned.skipped)


def build(config: LoRA, planned: Plan) -> dict[str, LoRALayer]:
    """The new layers by name; the model is as before."""
    layers = {}
    for name, module in planned.modules.items():
        kind = layer_for(module)
        assert kind is not None
        try:
            layers[name] = kind(
                module,
                r=config.rank(name),
                scale=config.scale(name),
                dropout=config.dropout,
                lora_bias=config.lora_bias,
                init=config.init,
                adapter_dtype=config.adapter_dtype,
            )
        except ValueError as error:
            raise ValueError(f"convert: {name}: {error}") from None
    return layers


def install(model: nn.Module, config: LoRA, layers: Mapping[str, LoRALayer]) -> None:
    """Put the layers of :func:`build` into the model, freeze the rest, and remember."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    replace(model, {layer.base: layer for layer in layers.values()})
    for layer in layers.values():
        layer.take_over()
        for parameter in (layer.lora_a, layer.lora_b, layer.lora_bias):
            if parameter is not None:
                parameter.requires_grad_(True)
    for parameter in biases(model, config, layers).values():
        parameter.requires_grad_(True)
    setattr(model, _RECORD, Conversion(config, flags))


def revert(model: nn.Module, *, weights: Literal["trained", "original"] = "trained") -> Report:
    """Undo :func:`convert`, or :func:`quantize` or :func:`compact` where no adapters came after it:
    the original module objects, training or frozen as before.

    Merged adapters are unmerged first, so the weights are the original ones bit for bit, but for
    what ``config.bias`` let train. A wrapper around the changed model does as well.

    Args:
        weights: of a model that trained in part (:class:`pyfastft.MaskedTuning`): leave them as
            they are now, or make them the original ones, bit for bit.

    Raises:
        ValueError: the model was not changed, or was quantized or compacted without
            ``keep_original``; or the file of the weights is damaged or of another model.
    """
    if weights not in ("trained", "original"):
        reject("revert", "weights", "'trained' or 'original'", repr(weights))
    if not is_converted(model):
        if tuning.is_tuned(model):
            return tuning.restore(model, weights=weights)
        if quantization.is_quantized(model):
            return quantization.restore(model)
        if compaction.is_compacted(model):
            return compaction.restore(model)
    inner, conversion = conversion_of(model, "revert")
    layers: dict[nn.Module, nn.Module] = {layer: layer.restore() for _, layer in adapters(inner)}
    names = [name for name, _ in adapters(inner)]
    replace(inner, layers)
    for name, parameter in inner.named_parameters():
        if name in conversion.requires_grad:
            parameter.requires_grad_(conversion.requires_grad[name])
    delattr(inner, _RECORD)
    return report("revert", inner, names)


def merge(model: nn.Module, *, safe: bool = False) -> Report:
    """Add every adapter to its weight, so that inference costs what the base model costs.

    Computed in float32 and rounded once. A copy of each original weight stays in CPU memory until
    :func:`unmerge`. Adapters merged already are skipped.

    Args:
        safe: raise ValueError, and change nothing, where a merged weight is not finite.

    Raises:
        ValueError: the model has no adapters; a weight is in 4 bits; or one is also another
            module's, which merging would change too.
    """
    layers = _expect_adapters(model, "merge")
    for name, layer in layers.items():
        if why := layer.why_not_merged():
            raise ValueError(f"merge: {name}: {why}")
    _expect_untied(model, layers)
    merged: list[str] = []
    try:
        for name, layer in layers.items():
            if not layer.merged:
                layer.merge(safe=safe)
                merged.append(name)
    except ValueError as error:
        for done in merged:
            layers[done].unmerge()
        raise ValueError(f"merge: {name}: {error}") from None
    return report("merge", model, merged, {n: "merged already" for n in layers if n not in merged})


def unmerge(model: nn.Module) -> Report:
    """Undo :func:`merge`: the original weights, bit for bit.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = _expect_adapters(model, "unmerge")
    merged = [name for name, layer in layers.items() if layer.merged]
    for layer in layers.values():
        layer.unmerge()
    return report("unmerge", model, merged, {n: "not merged" for n in layers if n not in merged})


def pack(model: nn.Module, *, dx: bool = False, replace: bool = False) -> Report:
    """Pack the frozen weights of a model's adapted linear layers once, so that no call does; on the
    CPU. See :meth:`pyfastft.nn.LoRALinear.pack`.

    Args:
        dx: pack them for the gradient of the input, too.
        replace: keep the packed forms alone; the weights' memory is given back.

    Returns:
        What was packed, and which adapted layers were not, with the reasons.

    Raises:
        ValueError: the model has no adapters, or no layer of it can be packed.
    """
    packed, skipped = [], {}
    for name, layer in _expect_adapters(model, "pack").items():
        if not isinstance(layer, LoRALinear):
            skipped[name] = "no linear layer with a plain weight"
        elif why := "the adapter is merged" if layer.merged else layer.why_not_packed():
            skipped[name] = why
        else:
            layer.pack(dx=dx, replace=replace)
            packed.append(name)
    if not packed:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"pack: expected a layer that can be packed, got none ({reasons})")
    return report("pack", model, packed, skipped)


def unpack(model: nn.Module) -> Report:
    """Undo :func:`pack`: the plain weights, bit for bit.

    Raises:
        ValueError: the model has no adapters.
    """
    linear = {
        name: layer
        for name, layer in _expect_adapters(model, "unpack").items()
        if isinstance(layer, LoRALinear)
    }
    packed = [name for name, layer in linear.items() if layer.packed]
    for layer in linear.values():
        layer.unpack()
    return report("unpack", model, packed, {n: "not packed" for n in linear if n not in packed})


def biases(
    model: nn.Module, config: LoRA, layers: Mapping[str, LoRALayer]
) -> dict[str, nn.Parameter]:
    """The biases of the base model that the config lets train, by name."""
    if config.bias == "none":
        return {}
    if config.bias == "all":
        return {n: p for n, p in model.named_parameters() if n == "bias" or n.endswith(".bias")}
    return {f"{n}.bias": layer.bias for n, layer in layers.items() if layer.bias is not None}


def conversion_of(model: nn.Module, caller: str) -> tuple[nn.Module, Conversion]:
    """The converted module inside the model, and its record."""
    for module in model.modules():
        if isinstance(record := module.__dict__.get(_RECORD), Conversion):
            return module, record
    raise ValueError(f"{caller}: expected a model that convert() changed")


def is_converted(model: nn.Module) -> bool:
    """Whether :func:`conversion_of` finds one."""
    return any(_RECORD in module.__dict__ for module in model.modules())


def remember(model: nn.Module, config: LoRA) -> None:
    """Give a converted module another config to remember."""
    record = model.__dict__[_RECORD]
    setattr(model, _RECORD, dataclasses.replace(record, config=config))


def _expect_adapters(model: nn.Module, caller: str) -> dict[str, LoRALayer]:
    layers = dict(adapters(model))
    if not layers:
        raise ValueError(f"{caller}: expected a model with adapters, got none")
    return layers


def _expect_untied(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for owner, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((owner, module))
    for name, layer in layers.items():
        for parameter in (layer.weight, layer.bias if layer.lora_bias is not None else None):
            others = [n for n, module in owners.get(id(parameter), []) if module is not layer]
            if others:
                raise ValueError(
                    f"merge: {name} shares a parameter with {', '.join(others)}, "
                    "which merging would change too"
                )
