"""A model's weights in 4 bits in place, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pyfastft._modules import adapters, expect_unconverted, replace
from pyfastft._report import Report, report
from pyfastft._targets import plan, untied
from pyfastft.config import PTQ4
from pyfastft.formats._files import (
    file_of_originals,
    naming,
    read_exactly,
    some,
    write_tensors,
)
from pyfastft.formats.checkpoint import Checkpoint, load_checkpoint
from pyfastft.nn._adapters import layer_for
from pyfastft.nn._int4_weight import Int4Weight
from pyfastft.nn._layer import LoRALayer
from pyfastft.nn._stand_in import HOOKS, why_not_kind, why_not_weight
from pyfastft.nn.int4 import int4_layer_for
from pyfastft.nn.lora import is_conv1d
from pyfastft.quantization.quantizers import quantize_weight
from pyfastft.quantization.tensor import QTensor4

__all__ = [
    "dequantize",
    "install",
    "is_quantized",
    "load_quantized",
    "quantize",
    "restore",
    "weights",
]

_RECORD = "_pyfastft_quantization"


@dataclass
class Quantization:
    """What a quantized model remembers: its config, and the modules that were there.

    Attributes:
        config: how it was quantized; None where its weights came in 4 bits.
        originals: the modules by name, their weights on the CPU or empty; None where not kept.
        file: what holds the weights, if a file does.
    """

    config: PTQ4 | None
    originals: dict[str, nn.Module] | None = None
    file: Path | None = None


def quantize(
    model: nn.Module,
    config: PTQ4,
    *,
    keep_original: Literal["cpu"] | str | os.PathLike[str] | None = None,
) -> Report:
    """Put every targeted layer's weight into 4 bits, in place.

    A linear layer becomes a :class:`pyfastft.nn.Int4Linear`, a convolution its like; a layer that
    stands in several places is changed once and stays shared. Layers that share one weight keep
    sharing it in 4 bits where all of them are targeted; a weight that is also, say, an embedding's
    is left alone. Nothing is changed before every weight is quantized. With
    ``config.activations`` convolutions are left alone.

    Args:
        model: any module, not itself such a layer.
        config: which layers, and how.
        keep_original: what :func:`pyfastft.revert` needs: ``"cpu"`` keeps the weights in the CPU's
            memory, anything else is a path to a safetensors file to write them to, which must not
            be there yet. By default they are given up.

    Returns:
        What was quantized, and what was targeted and left alone, with the reasons.

    Raises:
        ValueError: nothing would be quantized; a target matches nothing, with the nearest names; a
            weight is not finite; the model has adapters or was quantized before.
        FileExistsError: ``keep_original`` is there already.
    """
    if not isinstance(config, PTQ4):
        raise TypeError(f"quantize: expected config of type PTQ4, got {type(config).__name__}")
    from tqdm import tqdm

    expect_unconverted(model, "quantize")
    if is_quantized(model):
        raise ValueError("quantize: the model was quantized already, revert it first")
    file = file_of_originals(keep_original)
    planned = plan(model, config, caller="quantize", why_not=lambda m: _why_not(m, config))
    modules, skipped = untied(model, planned.modules)
    skipped = {**planned.skipped, **skipped}
    if not modules:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5])
        raise ValueError(f"quantize: expected weights that can be changed, got none ({reasons})")

    done: dict[nn.Parameter, QTensor4] = {}
    for name, module in tqdm(modules.items(), desc="quantize", unit="layer", disable=None):
        weight = _weight_of(module)
        if weight not in done:
            try:
                done[weight] = quantize_weight(as_matrix(module), config)
            except ValueError as error:
                raise ValueError(f"quantize: {name}: {error}") from None
    record = Quantization(config)
    if keep_original is not None:
        record.originals = dict(modules)
        if file is not None:
            write_tensors(file, {name: _weight_of(module) for name, module in modules.items()})
            record.file = file.resolve()
    held = {name: done[_weight_of(module)] for name, module in modules.items()}
    install(model, held, activations=config.activations)
    if keep_original is not None:
        for weight in done:
            weight.data = weight.data.new_empty(0) if file is not None else weight.data.cpu()
    remember(model, record)
    return report("quantize", model, modules, skipped)


def load_quantized(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    activations: Literal["int8"] | None = None,
    **options: Any,
) -> Report:
    """Put a 4-bit checkpoint into a model of its architecture, in place: its layers become 4-bit
    ones, and its other tensors are copied.

    Everything is checked before anything is changed.

    Args:
        model: the model with plain layers, possibly on the meta device.
        path: the checkpoint, see :func:`pyfastft.load_checkpoint`; **options: as there.
        activations: ``"int8"`` rounds what comes into the layers, which have to be linear and of
            the codebook int4, see :class:`pyfastft.nn.Int4Linear`; where absent what the config of
            a checkpoint in the format ``"pyfastft"`` says.

    Returns:
        Which layers are in 4 bits now, and which of the model's tensors the checkpoint lacks.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; or a layer or another tensor is none of the model's, or of
            another shape; or activations cannot be rounded beside a layer.
    """
    expect_unconverted(model, "load_quantized")
    checkpoint = load_checkpoint(path, **options)
    named, state = dict(model.named_modules()), model.state_dict()
    quantized = {name: layer.weight for name, layer in checkpoint.layers.items()}
    with naming(Path(path)):
        stated = _activations_of(checkpoint) if activations is None else activations
        activations = PTQ4(activations=stated).activations
        if unknown := sorted(quantized.keys() - named.keys()):
            raise ValueError(f"expected layers of the model's, got {some(unknown)}")
        for name, weight in quantized.items():
            module = named[name]
            if (why := _why_not_kind(module)) is not None:
                raise ValueError(f"{name}: expected a layer that can be in 4 bits, {why}")
            shape = tuple(as_matrix(module).shape)
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"{name}: expected a weight of shape {shape}, got {tuple(weight.shape)}"
                )
            del state[f"{name}.weight"]
            if not _weight_of(module).is_meta:
                quantized[name] = weight.to(_weight_of(module).device)
        if unknown := sorted(checkpoint.rest.keys() - state.keys()):
            raise ValueError(f"expected tensors of the model's, got {some(unknown)}")
        for name, tensor in checkpoint.rest.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"expected {name} of shape {tuple(state[name].shape)}, got "
                    f"{tuple(tensor.shape)}"
                )
    install(model, quantized, activations=activations)
    meta = any(tensor.is_meta for tensor in state.values())
    model.load_state_dict(dict(checkpoint.rest), strict=False, assign=meta)
    remember(model, Quantization(None))
    lacking = dict.fromkeys(state.keys() - checkpoint.rest.keys(), "not in the checkpoint")
    return report("load_quantized", model, quantized, lacking)


def remember(model: nn.Module, record: Quantization) -> None:
    """Give a model that is in 4 bits its record."""
    setattr(model, _RECORD, record)


def install(
    model: nn.Module,
    quantized: Mapping[str, QTensor4],
    *,
    activations: Literal["int8"] | None = None,
) -> None:
    """Put 4-bit layers over these weights in the places of the modules of these names, with their
    biases, hooks and mode.

    Raises:
        ValueError: activations cannot be rounded beside one of them; nothing is changed.
    """
    named = dict(model.named_modules())
    layers: dict[nn.Module, nn.Module] = {}
    options: dict[str, Any] = {} if activations is None else {"activations": activations}
    for name, weight in quantized.items():
        module = named[name]
        kind = int4_layer_for(module)
        assert kind is not None
        why = kind.why_not_rounded(weight.k, weight.group_size, weight.codebook)
        if activations is not None and why is not None:
            raise ValueError(f"{name}: expected a layer whose activations can be rounded, {why}")
        layers[module] = layer = kind.from_module(module, weight, **options)
        for hooks in HOOKS:
            layer.__dict__[hooks] = module.__dict__[hooks]
        layer.train(module.training)
    replace(model, layers)


def is_quantized(model: nn.Module) -> bool:
    """Whether :func:`quantize` changed the model, or one inside it."""
    return any(_RECORD in module.__dict__ for module in model.modules())


def weights(model: nn.Module) -> dict[str, QTensor4]:
    """The model's 4-bit weights by module name."""
    named = model.named_modules()
    return {name: module.quantized for name, module in named if isinstance(module, Int4Weight)}


def restore(model: nn.Module) -> Report:
    """Undo :func:`quantize`: the original module objects with their weights.

    Raises:
        ValueError: the model was not quantized, or without ``keep_original``; or the file of the
            weights is damaged or of another model.
        FileNotFoundError: it is gone.
    """
    inner = next((m for m in model.modules() if _RECORD in m.__dict__), None)
    if inner is None:
        raise ValueError("revert: expected a model that quantize() changed")
    record: Quantization = inner.__dict__[_RECORD]
    if record.originals is None:
        raise ValueError(
            "revert: the original weights were given up; quantize with keep_original='cpu' or a "
            "path to get them back, or dequantize() the model"
        )
    stored = {} if record.file is None else read_exactly(record.file, record.originals)
    named = dict(inner.named_modules())
    layers: dict[nn.Module, nn.Module] = {}
    for name, module in record.originals.items():
        layer = named[name]
        weight = _weight_of(module)
        assert isinstance(layer, Int4Weight)
        weight.data = stored.get(name, weight.data).to(layer.codes.device)
        if "bias" in module._parameters:
            module._parameters["bias"] = layer._parameters["bias"]
        layers[layer] = module.train(layer.training)
    replace(inner, layers)
    delattr(inner, _RECORD)
    return report("revert", inner, record.originals)


def dequantize(model: nn.Module, *, dtype: torch.dtype | None = None) -> Report:
    """Make every 4-bit layer's weight dense again, in place: nn.Linear and convolutions over what
    the codes stand for. Adapters stay as they are, over dense layers, and can then be merged.

    Args:
        dtype: of the weights; absent, of each what its layer computes in.

    Returns:
        What was made dense.

    Raises:
        ValueError: the model has no 4-bit layers.
    """
    layers: dict[nn.Module, nn.Module] = {}
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Int4Weight):
            layers[module] = _dense_layer(module, dtype)
            names.append(name)
    if not names:
        raise ValueError("dequantize: expected a model with 4-bit layers, got none")
    replace(model, layers)
    for _, layer in adapters(model):
        if layer in set(layers.values()):
            layer.take_over()
    for module in model.modules():
        module.__dict__.pop(_RECORD, None)
    return report("dequantize", model, names)


def _dense_layer(module: Int4Weight, dtype: torch.dtype | None) -> nn.Module:
    adapted = isinstance(module, LoRALayer)
    base = module.base if isinstance(module, LoRALayer) else module
    dtype = module.dtype if dtype is None else dtype
    weight = module.weight.to(dtype)
    bias = module._parameters["bias"]
    dense: nn.Module
    if weight.dim() == 2:
        n, k = weight.shape
        dense = nn.Linear(k, n, bias=bias is not None, device="meta")
    else:
        options = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        dense = base.KIND(  # type: ignore[operator]
            base.in_channels,
            base.out_channels,
            **{name: getattr(base, name) for name in options},
            bias=bias is not None,
            device="meta",
        )
    dense.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if bias is not None:
        if bias.dtype is not dtype:
            bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
        dense.register_parameter("bias", bias)
    for hooks in HOOKS:
        dense.__dict__[hooks] = module.__dict__[hooks]
    dense.train(module.training)
    if not adapted:
        return dense
    assert isinstance(module, LoRALayer)
    kind = layer_for(dense)
    assert kind is not None
    layer = kind(
        dense,
        r=module.r,
        scale=module.scale,
        dropout=module.dropout,
        lora_bias=module.lora_bias is not None,
    )
    for name in ("lora_a", "lora_b", "lora_bias"):
        layer.register_parameter(name, module._parameters[name])
    layer.enabled, layer.init = module.enabled, module.init
    return layer


def _activations_of(checkpoint: Checkpoint) -> Any:
    """What the checkpoint's config says of activations; other formats' configs do not say it so."""
    return checkpoint.config.get("activations") if checkpoint.format == "pyfastft" else None


def _why_not(module: nn.Module, config: PTQ4) -> str | None:
    """Why a module cannot be quantized as the config says; None where it can."""
    if (why := _why_not_kind(module)) is not None:
        return why
    if config.activations is not None:
        kind, k = int4_layer_for(module), as_matrix(module).shape[1]
        assert kind is not None
        size = k if config.group_size == -1 else config.group_size
        if (why := kind.why_not_rounded(k, size, config.codebook)) is not None:
            return why
    return "its weight is on the meta device" if _weight_of(module).is_meta else None


def _why_not_kind(module: nn.Module) -> str | None:
    """Why no 4-bit layer can stand in for the module; None where one can."""
    if isinstance(module, Int4Weight):
        return "its weight is in 4 bits already"
    adapted = layer_for(module)
    if int4_layer_for(module) is None or adapted is None:
        return f"{type(module).__name__} is no linear layer or convolution"
    return why_not_kind(module, adapted.kinds()) or why_not_weight(module)


def _weight_of(module: nn.Module) -> nn.Parameter:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def as_matrix(module: nn.Module) -> torch.Tensor:
    """The weight (N, K) of a linear layer, Conv1D or convolution, a view of it."""
    weight = _weight_of(module).detach()
    return weight.T if is_conv1d(module) else weight.flatten(1)
