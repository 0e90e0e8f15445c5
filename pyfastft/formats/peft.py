"""Adapters as PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

The tensors are named ``base_model.model.<module>.lora_A.weight`` (R, K), ``.lora_B.weight`` (N, R)
and, where B has a bias, ``.lora_B.bias`` (N,); those of a convolution have its kernel's dimensions
behind these, and those of an embedding are ``.lora_embedding_A`` and ``.lora_embedding_B``; a bias
of the base that trains is named ``<module>.base_layer.bias`` where the module has an adapter, and
by its own name elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyfastft._check import FLOATS, name_of
from pyfastft._modules import adapters, expect_unconverted
from pyfastft._report import Report, report
from pyfastft._targets import plan, selects_exactly
from pyfastft.config import LoRA
from pyfastft.conversion import biases, build, conversion_of, install, is_converted, remember
from pyfastft.formats._files import naming, read_json, read_tensors, some, write_folder
from pyfastft.nn._adapters import layer_for
from pyfastft.nn._layer import LoRALayer

__all__ = ["config_from_peft", "hotswap_adapter", "load_adapter", "save_adapter"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# PEFT's keys that have a field of ours.
_FIELDS = {
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "use_rslora",
    "bias": "bias",
    "lora_bias": "lora_bias",
}
# Those that do not change what a loaded adapter computes. fan_in_fan_out follows from the layer.
_INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Initialisations that leave the base's weights alone; the others would have to be done over.
_INITS: dict[Any, str] = {
    True: "kaiming",
    False: "random",
    "gaussian": "gaussian",
    "eva": "kaiming",
    "orthogonal": "kaiming",
}


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted model's adapters so that PEFT and :func:`load_adapter` read them.

    A new folder appears whole or not at all. In one that exists both files are written beside the
    old ones before they take their places.

    Args:
        model: a model that :func:`pyfastft.convert` changed, or a wrapper around one.
        folder: where to; made where missing.

    Raises:
        ValueError: the model was not converted, or its trained biases hold merged adapters.
        NotADirectoryError: the folder is a file.
    """
    from safetensors.torch import save

    inner, conversion = conversion_of(model, "save_adapter")
    layers = dict(adapters(inner))
    if conversion.config.bias != "none" and any(layer.merged for layer in layers.values()):
        raise ValueError("save_adapter: adapters are merged, unmerge first to save the biases")
    tensors = {
        key: parameter.detach().to("cpu", copy=True).contiguous()
        for key, parameter in _parameters(inner, conversion.config, layers).items()
    }
    config = _config_to_peft(inner, conversion.config, layers)
    # Between the two an adapter without its config would be no adapter, never a wrong one.
    write_folder(
        Path(folder),
        {
            WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
            CONFIG_FILE: json.dumps(config, indent=2).encode(),
        },
        first=(CONFIG_FILE,),
    )


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Report:
    """Put an adapter that PEFT or :func:`save_adapter` wrote on a model, and let it train.

    Everything is checked before anything is changed. A model that was converted already keeps its
    layers, if they are those of the file, and its dropout; it takes the file's values and scales.

    Args:
        model: the base model, or one converted to the same layers and ranks.
        folder: what holds ``adapter_config.json`` and ``adapter_model.safetensors``. Nothing
            else is opened, and nothing downloaded.

    Returns:
        What was converted and loaded.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the config asks for something that would compute otherwise here, by its key;
            a tensor is missing, left over, of the wrong shape or dtype, or not finite; a file is
            damaged; the model has other adapters, or merged ones.
    """
    folder = Path(folder)
    with naming(folder / CONFIG_FILE):
        config = config_from_peft(read_json(folder / CONFIG_FILE))
    tensors = read_tensors(folder / WEIGHTS_FILE)
    inner, skipped = model, dict[str, str]()
    if is_converted(model):
        inner, conversion = conversion_of(model, "load_adapter")
        layers = dict(adapters(inner))
        _expect_same_layers(inner, config, layers, conversion.config)
        kept = ("dropout", "init", "adapter_dtype")
        config = dataclasses.replace(
            config, **{name: getattr(conversion.config, name) for name in kept}
        )
    else:
        expect_unconverted(model, "load_adapter")
        planned = plan(model, config, strict=False)
        with naming(folder / WEIGHTS_FILE):
            _expect_ranks(tensors, config, planned.modules)
        layers, skipped = build(config, planned), planned.skipped
    parameters = _parameters(inner, config, layers) | _saved_embeddings(inner, tensors)
    with naming(folder / WEIGHTS_FILE):
        _expect_to_fit(tensors, parameters)

    if not is_converted(model):
        install(model, config, layers)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
    for name, layer in layers.items():
        layer.scale = config.scale(name)
    remember(inner, config)
    return report("load_adapter", inner, layers, skipped)


def hotswap_adapter(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
    *,
    config: LoRA | None = None,
) -> Report:
    """Give a converted model the values of another adapter in place, so that a compiled model need
    not be compiled again.

    Ranks below a layer's own are filled up with zeros; convert with the largest rank that will
    come. Layers that the adapter lacks compute as their base. Everything is checked before
    anything is changed.

    Args:
        model: a model that :func:`pyfastft.convert` changed, or a wrapper around one, compiled or
            not. Its dropout stays.
        source: the folder of an adapter as :func:`load_adapter` takes it, or its tensors by PEFT's
            names.
        config: what gives the scales beside tensors; without it they stay. A folder has its own.

    Returns:
        Which layers took the adapter's values, and which it lacks.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the model was not converted; an adapter is merged; a layer's rank is smaller
            than the adapter's; biases train in one and not in the other; or a tensor is missing,
            left over, of the wrong shape or dtype, or not finite.
    """
    inner, conversion = conversion_of(model, "hotswap_adapter")
    layers = dict(adapters(inner))
    if isinstance(source, Mapping):
        where, tensors = Path("tensors"), dict(source)
    else:
        if config is not None:
            raise ValueError("hotswap_adapter: expected no config beside a folder, it has its own")
        where, tensors = Path(source) / WEIGHTS_FILE, read_tensors(Path(source) / WEIGHTS_FILE)
        with naming(Path(source) / CONFIG_FILE):
            config = config_from_peft(read_json(Path(source) / CONFIG_FILE))
    if config is not None:
        _expect_same_biases("hotswap_adapter", config, conversion.config)
    lacking = {}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"hotswap_adapter: {name} is merged, unmerge first")
        if not any(f"{_PREFIX}{name}.{suffix}" in tensors for suffix in layer.adapter()):
            lacking[name] = "not in the adapter, it computes as its base"
            for suffix, parameter in layer.adapter().items():
                tensors[f"{_PREFIX}{name}.{suffix}"] = torch.zeros_like(parameter)
    if len(lacking) == len(layers):
        raise ValueError(f"{where}: expected tensors of the model's layers, got none")
    parameters = _parameters(inner, conversion.config, layers)
    with naming(where):
        for name in layers.keys() - lacking.keys():
            rank = None if config is None else config.rank(name)
            _fill_rank(tensors, name, layers[name], rank)
        _expect_to_fit(tensors, parameters)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
    swapped = [name for name in layers if name not in lacking]
    if config is not None:
        for name in swapped:
            layers[name].scale = config.scale(name)
    return report("hotswap_adapter", inner, swapped, lacking)


def _fill_rank(
    tensors: dict[str, torch.Tensor], name: str, layer: LoRALayer, rank: int | None
) -> None:
    """Bring an adapter's A and B to the layer's rank, with zeros."""
    for side, dim in (("lora_a", 0), ("lora_b", 1)):
        key = f"{_PREFIX}{name}.{layer.FILE_NAMES[side]}"
        own = getattr(layer, side)
        if key not in tensors or tensors[key].dim() != own.dim():
            continue  # What follows says so.
        tensor, groups = tensors[key], layer.r // layer.lora_b.shape[1]
        got = tensor.shape[dim] * (groups if dim else 1)
        if rank is not None and got != rank:
            raise ValueError(f"expected {key} of rank {rank}, got {tuple(tensor.shape)}")
        if got > layer.r:
            raise ValueError(
                f"expected {name} of rank {layer.r} at most, got {got}; convert with r={got}"
            )
        if got < layer.r:
            if groups > 1:
                raise ValueError(f"expected {name}, which has groups, of rank {layer.r}, got {got}")
            missing = list(tensor.shape)
            missing[dim] = layer.r - got
            tensors[key] = torch.cat([tensor, tensor.new_zeros(missing)], dim)


def config_from_peft(values: Mapping[str, Any]) -> LoRA:
    """The config of what ``adapter_config.json`` holds.

    Raises:
        ValueError, TypeError: a key would change what is computed and is not supported, or its
            value does not fit; the message names the key.
    """
    if values.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"peft_type: expected 'LORA', got {values['peft_type']!r}")
    if values.get("target_modules") is None:
        raise ValueError("target_modules: expected names or a regular expression, got none")
    fields: dict[str, Any] = {}
    for key, value in values.items():
        # PEFT takes an empty list of layers for all layers.
        empty = value is None or value is False or value in ("", [], {})
        if key in _FIELDS and not empty:
            fields[_FIELDS[key]] = value
        elif key == "init_lora_weights" and value is not None:
            if not isinstance(value, (bool, str)) or value not in _INITS:
                raise ValueError(
                    f"init_lora_weights: expected one that leaves the base model's weights "
                    f"alone ({', '.join(map(repr, _INITS))}), got {value!r}"
                )
            fields["init"] = _INITS[value]
        elif key not in _FIELDS and key not in _INERT and not empty:
            raise ValueError(f"{key}: expected no value, it is not supported, got {value!r}")
    if fields.get("lora_bias") and fields.get("init") == "gaussian":
        fields["init"] = "kaiming"  # The tensors come from the file.
    try:
        return LoRA(**fields)
    except (TypeError, ValueError) as error:
        ours, _, rest = str(error).partition(":")
        key = next((k for k, name in _FIELDS.items() if name == ours), ours)
        raise type(error)(f"{key}:{rest}") from None


def _config_to_peft(
    model: nn.Module, config: LoRA, layers: Mapping[str, LoRALayer]
) -> dict[str, Any]:
    """The config as PEFT's keys, so that PEFT's rules find exactly these layers and scales."""
    ours = config.to_dict()
    if not selects_exactly(config, model, layers):
        ours |= {"targets": _targets_of(model, layers), "exclude": [], "layers": None}
        ours["layers_pattern"] = None
    if any(layer.scale != config.scale(name) for name, layer in layers.items()):
        # A layer's scale was set. PEFT takes the first pattern that matches a name's end: every
        # layer gets one, the longest name first.
        ours["alpha_pattern"] = {
            re.escape(name): layers[name].scale
            * (math.sqrt(layers[name].r) if config.use_rslora else layers[name].r)
            for name in sorted(layers, key=len, reverse=True)
        }
    inits: dict[str, Any] = {"kaiming": True, "random": False, "gaussian": "gaussian"}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model.__dict__.get("name_or_path") or None,
        "inference_mode": True,
        "fan_in_fan_out": any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        "init_lora_weights": inits[config.init],
        **{key: ours[name] for key, name in _FIELDS.items()},
        "exclude_modules": ours["exclude"] or None,
    }


def _targets_of(model: nn.Module, names: Collection[str]) -> str | list[str]:
    """The names; as one regular expression where another module's name ends like one of them."""
    listed = LoRA(targets=tuple(names))
    if selects_exactly(listed, model, names):
        return list(names)
    return "|".join(re.escape(name) for name in names)


def _parameters(
    model: nn.Module, config: LoRA, layers: Mapping[str, LoRALayer]
) -> dict[str, nn.Parameter]:
    """What the file holds, by its names there."""
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        for suffix, parameter in layer.adapter().items():
            parameters[f"{_PREFIX}{name}.{suffix}"] = parameter
    for name, bias in biases(model, config, layers).items():
        owner = name.rpartition(".")[0]
        inside = f"{owner}.base_layer.bias" if owner in layers else name
        parameters[_PREFIX + inside] = bias
    return parameters


def _saved_embeddings(
    model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> dict[str, nn.Parameter]:
    """The base tables that PEFT writes beside adapters of a transformers model's embeddings."""
    parameters = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        table = getattr(model, getter, lambda: None)()
        for name, module in model.named_modules():
            if module is table:
                for key in (f"{_PREFIX}{name}.weight", f"{_PREFIX}{name}.base_layer.weight"):
                    if key in tensors:
                        parameters[key] = table.weight
    return parameters


def _expect_same_layers(
    model: nn.Module, config: LoRA, layers: Mapping[str, LoRALayer], current: LoRA
) -> None:
    wanted = plan(model, config, strict=False).modules
    if differing := sorted(wanted.keys() ^ layers.keys()):
        raise ValueError(
            f"load_adapter: expected an adapter of the model's {len(layers)} layers, "
            f"got one that differs in {some(differing)}"
        )
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"load_adapter: {name} is merged, unmerge first")
        if layer.r != config.rank(name):
            raise ValueError(
                f"load_adapter: expected rank {layer.r} of {name}, got {config.rank(name)}"
            )
    _expect_same_biases("load_adapter", config, current)


def _expect_same_biases(caller: str, config: LoRA, current: LoRA) -> None:
    for option in ("bias", "lora_bias"):
        if getattr(config, option) != getattr(current, option):
            raise ValueError(
                f"{caller}: expected {option} of {getattr(current, option)!r} as the model "
                f"was converted, got {getattr(config, option)!r}"
            )


def _expect_ranks(
    tensors: Mapping[str, torch.Tensor], config: LoRA, modules: Mapping[str, nn.Module]
) -> None:
    """A rank that no tensor has is refused before anything of its size is allocated."""
    for name, module in modules.items():
        kind = layer_for(module)
        assert kind is not None
        key = f"{_PREFIX}{name}.{kind.FILE_NAMES['lora_a']}"
        if key not in tensors:
            raise ValueError(f"expected a tensor for every layer, none for {key}")
        if tensors[key].shape[:1] != (config.rank(name),):
            raise ValueError(
                f"expected {key} of rank {config.rank(name)}, got {tuple(tensors[key].shape)}"
            )


def _expect_to_fit(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    if missing := sorted(parameters.keys() - tensors.keys()):
        raise ValueError(f"expected a tensor for every layer, none for {some(missing)}")
    if left_over := sorted(tensors.keys() - parameters.keys()):
        raise ValueError(f"expected tensors of the adapted layers only, got {some(left_over)}")
    for key, parameter in parameters.items():
        tensor = tensors[key]
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"expected {key} of shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(f"expected {key} of a float dtype, got {name_of(tensor.dtype)}")
        if not torch.isfinite(tensor.to(parameter.dtype)).all():
            raise ValueError(f"expected {key} of finite {name_of(parameter.dtype)} values")
