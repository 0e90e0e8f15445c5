"""4-bit checkpoints of other libraries, a file or a folder at a time: read, write, verify.

The formats: ``"gptq"``, ``"awq"``, ``"compressed-tensors"``, ``"bitsandbytes"``, each a module here
with ``decode`` and ``encode`` for one layer, and ``"pyfastft"``, the tensors of
:class:`pyfastft.quantization.QTensor4` as they are. GGUF files are :mod:`pyfastft.formats.gguf`'s.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyfastft.formats import awq, bitsandbytes, compressed_tensors, gptq
from pyfastft.formats._files import naming, read_json, read_tensors, write_folder
from pyfastft.formats._words import Layer
from pyfastft.quantization.tensor import LAYOUT, TENSORS, QTensor4

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint", "verify"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "quantize_config.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        format: which of the formats it is in.
        layers: the 4-bit layers by module name.
        rest: all other tensors by name.
        config: its quantization config, empty where there is none.
    """

    format: str
    layers: Mapping[str, Layer]
    rest: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _Own:
    """QTensor4's own tensors, as a format like the others."""

    TENSORS = (*TENSORS.values(), LAYOUT)

    @staticmethod
    def decode(tensors: Mapping[str, torch.Tensor]) -> Layer:
        return Layer(QTensor4.from_tensors(tensors))

    @staticmethod
    def encode(weight: QTensor4) -> dict[str, torch.Tensor]:
        return weight.tensors()


_FORMATS: dict[str, Any] = {
    "pyfastft": _Own,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
}
# What a layer of each format cannot be without.
_MARKS = {
    "pyfastft": (".codes",),
    "gptq": (".qweight",),
    "awq": (".qweight",),
    "compressed-tensors": (".weight_packed",),
    "bitsandbytes": tuple(f".{name}" for name in bitsandbytes.TENSORS if "quant_state" in name),
}


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    checkpoint_format: str | None = None,
    group_size: int | None = None,
) -> Checkpoint:
    """Read a 4-bit checkpoint: a safetensors file, or a folder with one or with its shards.

    Args:
        path: the file or folder. Nothing else is opened, nothing downloaded, nothing unpickled.
        format: of the layers; where absent what the folder's config or the tensors' names say.
        checkpoint_format: ``"gptq"`` or ``"gptq_v2"``; where absent what the config says, else
            ``"gptq"``.
        group_size: where absent what the config says, else what the shapes say.

    Returns:
        The layers, and the other tensors as they are.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, a layer's tensors do not fit, or no layer is in 4 bits; the
            message names file and layer.
    """
    path = Path(path)
    tensors, config = _read(path)
    with naming(path):
        format = _format_of(tensors, config, format)
        names = _layers_of(tensors, format)
        if not names:
            raise ValueError(f"expected 4-bit layers in the format {format}, got none")
        hints: dict[str, Any] = {}
        if format in ("gptq", "awq", "compressed-tensors"):
            hints["group_size"] = _group_size(config) if group_size is None else group_size
        if format == "gptq":
            hints["checkpoint_format"] = checkpoint_format or _checkpoint_format(config)
        layers: dict[str, Layer] = {}
        for name in names:
            own = _pop(tensors, name, format)
            try:
                layers[name] = _FORMATS[format].decode(own, **hints)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from None
    return Checkpoint(format, layers, tensors, config)


def save_checkpoint(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> None:
    """Write a checkpoint: ``model.safetensors`` and ``quantize_config.json``, whole or not at all.

    Args:
        checkpoint: as :func:`load_checkpoint` gave it, or one's own. Its layers' options go to the
            format's ``encode``; the config is written as it is, or made where it is empty.
        folder: where to; made where missing, other files in it stay.

    Raises:
        ValueError: the format cannot hold a layer; the message names it.
    """
    from safetensors.torch import save

    tensors = dict(checkpoint.rest)
    for name, layer in checkpoint.layers.items():
        for suffix, tensor in _encoded(checkpoint.format, name, layer).items():
            tensors[f"{name}.{suffix}"] = tensor
    config = dict(checkpoint.config) or _config_of(checkpoint)
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_folder(
        Path(folder),
        {
            WEIGHTS_FILE: save(stored, metadata={"format": "pt"}),
            CONFIG_FILE: json.dumps(config, indent=2).encode(),
        },
        first=(WEIGHTS_FILE,),
    )


def verify(
    layers: Mapping[str, QTensor4], path: str | os.PathLike[str], **options: Any
) -> dict[str, int]:
    """Prove that weights hold exactly what a checkpoint does.

    The file is read again, and its codes, scales, zero-points and order are compared with the
    weights'; then each weight is written in the file's format and its tensors compared with the
    file's, bit for bit.

    Args:
        layers: weights by module name: all of the checkpoint, and no others.
        path: the checkpoint, as for :func:`load_checkpoint`; **options: as there.

    Returns:
        How many layers, codes and bytes were found the same.

    Raises:
        ValueError: something differs; the message says what and where first.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path, **options)
    stored, _ = _read(path)
    if differing := sorted(layers.keys() ^ checkpoint.layers.keys()):
        raise ValueError(f"{path}: expected the same layers, {differing[0]} is in one only")
    counts = {"layers": 0, "codes": 0, "bytes": 0}
    with naming(path):
        for name, layer in checkpoint.layers.items():
            weight = layers[name].to("cpu")
            for part, theirs in layer.weight.tensors().items():
                ours = weight.tensors().get(part)
                if ours is None or ours.dtype != theirs.dtype:
                    raise ValueError(f"{name}: expected {part} as in the file, got another kind")
                _expect_equal(name, part, ours, theirs)
            written = _encoded(checkpoint.format, name, Layer(weight, layer.options))
            for suffix, tensor in written.items():
                _expect_equal(name, suffix, tensor, stored[f"{name}.{suffix}"])
                counts["bytes"] += tensor.nbytes
            counts["layers"] += 1
            counts["codes"] += weight.n * weight.k
    return counts


def _expect_equal(name: str, part: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise ValueError(
            f"{name}: expected {part} of {tuple(theirs.shape)} {theirs.dtype}, "
            f"got {tuple(ours.shape)} {ours.dtype}"
        )
    different = ours.contiguous().flatten().view(torch.uint8)
    different = different != theirs.contiguous().flatten().view(torch.uint8)
    if bool(different.any()):
        at = int(different.nonzero()[0])
        raise ValueError(f"{name}: {part} differs in {int(different.sum())} bytes, first at {at}")


def _encoded(format: str, name: str, layer: Layer) -> dict[str, torch.Tensor]:
    try:
        return _FORMATS[format].encode(layer.weight, **layer.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


# -- reading ---------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors, and the quantization config."""
    if not path.is_dir():
        return read_tensors(path), {}
    config: dict[str, Any] = {}
    for name in ("config.json", CONFIG_FILE):
        if (path / name).is_file():
            with naming(path / name):
                values = read_json(path / name)
                values = values if name == CONFIG_FILE else values.get("quantization_config", {})
                if not isinstance(values, dict):
                    raise ValueError("expected a quantization config that is an object")
                config |= values
    if not (path / INDEX_FILE).is_file():
        return read_tensors(path / WEIGHTS_FILE), config
    with naming(path / INDEX_FILE):
        shards = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError("expected weight_map of names and files")
        for shard in shards.values():
            # A file of this folder and of no other.
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", "..", "."):
                raise ValueError(f"expected files of this folder, got {shard!r}")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(shards.values())):
        for name, tensor in read_tensors(path / shard).items():
            if name in tensors:
                raise ValueError(f"{path / shard}: expected {name} in one shard only")
            tensors[name] = tensor
    return tensors, config


def _layers_of(tensors: Mapping[str, torch.Tensor], format: str) -> list[str]:
    return [
        name[: -len(mark)] for mark in _MARKS[format] for name in tensors if name.endswith(mark)
    ]


def _pop(tensors: dict[str, torch.Tensor], name: str, format: str) -> dict[str, torch.Tensor]:
    suffixes = _FORMATS[format].TENSORS
    return {s: tensors.pop(f"{name}.{s}") for s in suffixes if f"{name}.{s}" in tensors}


def _format_of(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], format: str | None
) -> str:
    format = format or config.get("quant_method")
    if format is None:
        format = _format_of_names(tensors)
    if not isinstance(format, str) or format not in _FORMATS:
        raise ValueError(f"expected a format of {', '.join(_FORMATS)}, got {format!r}")
    return format


def _format_of_names(tensors: Mapping[str, torch.Tensor]) -> str:
    for format in ("compressed-tensors", "bitsandbytes", "pyfastft"):
        if _layers_of(tensors, format):
            return format
    for name in _layers_of(tensors, "gptq"):
        qweight, scales = tensors[f"{name}.qweight"], tensors.get(f"{name}.scales")
        if scales is not None and qweight.dim() == scales.dim() == 2:
            return "gptq" if qweight.shape[1] == scales.shape[1] else "awq"
    raise ValueError("expected 4-bit layers of a known format, got none; name the format")


def _group_size(config: Mapping[str, Any]) -> int | None:
    value = config.get("group_size")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"expected group_size of an integer, got {value!r}")
    return value


def _checkpoint_format(config: Mapping[str, Any]) -> str:
    value = config.get("checkpoint_format", "gptq")
    if value not in gptq.FORMATS:
        raise ValueError(f"expected checkpoint_format of gptq or gptq_v2, got {value!r}")
    return value


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config that the format's other readers look for."""
    weights = [layer.weight for layer in checkpoint.layers.values()]
    sizes = {-1 if weight.groups <= 1 else weight.group_size for weight in weights}
    size = sizes.pop() if len(sizes) == 1 else None
    zeros = any(weight.zero is not None for weight in weights)
    config: dict[str, Any] = {"quant_method": checkpoint.format}
    if checkpoint.format == "gptq":
        formats = {
            layer.options.get("checkpoint_format", "gptq") for layer in checkpoint.layers.values()
        }
        config |= {
            "bits": 4,
            "group_size": size,
            "sym": not zeros,
            "desc_act": any(weight.perm is not None for weight in weights),
            "checkpoint_format": formats.pop() if len(formats) == 1 else None,
        }
    elif checkpoint.format == "awq":
        config |= {"bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    elif checkpoint.format == "compressed-tensors":
        config |= {"format": "pack-quantized", "quantization_status": "compressed"}
        scheme = {"num_bits": 4, "type": "int", "symmetric": not zeros, "dynamic": False}
        scheme |= {"strategy": "channel"} if size == -1 else {"strategy": "group"}
        scheme["group_size"] = None if size == -1 else size
        config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    elif checkpoint.format == "bitsandbytes":
        config |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": weights[0].codebook if weights else "nf4",
            "bnb_4bit_use_double_quant": any(
                "nested" in layer.options for layer in checkpoint.layers.values()
            ),
        }
    return config
