"""Compacted models as safetensors files: ``save_pruned`` and ``load_pruned``.

The tensors are those of the model's state dict; of tied ones there is the first. The metadata has
one entry, ``pyfastft.pruned``: a line with the sha256 of manifest and tensors, then the manifest in
JSON: the size of every width that can change, by the name of the layer that reads it; and of every
layer made of blocks, by its name, rows and columns of a block.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from pyfastft._check import reject
from pyfastft._modules import expect_unconverted
from pyfastft._report import Report, report
from pyfastft.formats._files import naming, some
from pyfastft.formats._manifest import Kind
from pyfastft.nn.block_sparse import BlockSparseLinear
from pyfastft.pruning.compaction import (
    Compaction,
    expect_nothing_kept,
    install,
    install_blocks,
    remember,
)
from pyfastft.pruning.pattern import BlockPattern
from pyfastft.pruning.structures import Width, widths_of

__all__ = ["load_pruned", "save_pruned"]

_FILE = Kind("pyfastft.pruned", "pruned model", version=1, fields={"widths": dict, "blocks": dict})


def save_pruned(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model that :func:`pyfastft.compact` made smaller, whatever its layers' widths.

    An ordinary safetensors file of the model's state dict, and the widths in its metadata. It
    appears whole or not at all.

    Args:
        model: the model, also one that is in training; its adapters are to be reverted first.
        path: the file, of any name.

    Raises:
        ValueError: the model has adapters or trains in part, or is on the meta device.

    Example:
        >>> ft.compact(model)
        >>> ft.save_pruned(model, "small.safetensors")
        >>> ft.load_pruned(AutoModel.from_config(config), "small.safetensors")
    """
    expect_unconverted(model, "save_pruned")
    state = model.state_dict()
    tensors = {name: state[name] for name in _first_names(model).values()}
    if meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"save_pruned: expected a model with data, {some(meta)} is on meta")
    widths = {name: model.get_submodule(name).in_features for name in widths_of(model)[0]}
    blocks = {name: list(layer.pattern.block) for name, layer in _block_sparse(model).items()}
    _FILE.write(Path(path), {"widths": widths, "blocks": blocks}, tensors)


def load_pruned(model: nn.Module, path: str | os.PathLike[str]) -> Report:
    """Put what :func:`save_pruned` wrote into a model of the architecture as it was before, in
    place: its layers get the widths of the file, then all its tensors are those of the file, each
    in the model's dtype.

    Everything is checked before anything is changed. Nothing is unpickled.

    Args:
        model: the model, new or not, possibly on the meta device.
        path: the file.

    Returns:
        The linear layers that are smaller now, or made of blocks.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is damaged, or of another version or of another architecture; or the model
            has adapters or layers made of blocks, trains in part, or keeps the originals of a
            compaction.
    """
    expect_unconverted(model, "load_pruned")
    expect_nothing_kept(model, "load_pruned")
    if names := list(_block_sparse(model)):
        reject("load_pruned", "model", "dense layers", f"blocks in {some(names)}")
    path = Path(path)
    manifest, tensors = _FILE.read(path)
    widths, whys = widths_of(model)
    first = _first_names(model)
    own = model.state_dict(keep_vars=True)
    with naming(path):
        for name, size in manifest["widths"].items():
            if name not in widths:
                why = whys.get(name, "the model has no such width")
                raise ValueError(f"{name}: expected a layer whose width can change, {why}")
            _expect_size(model, widths[name], size)
        smaller = _smaller(model, widths, manifest["widths"])
        shapes = {name: tuple(own[name].shape) for name in first.values()} | smaller
        patterns = {}
        for name, block in manifest["blocks"].items():
            if name not in {layer for width in widths.values() for layer in width.layers}:
                why = whys.get(name, "the model has no such layer")
                raise ValueError(f"{name}: expected a layer that can be made of blocks, {why}")
            shape = shapes.pop(f"{name}.weight")
            patterns[name] = pattern = _pattern(name, block, shape, tensors)
            shapes[f"{name}.values"] = (pattern.blocks, *pattern.block)
            shapes[f"{name}.index"] = tuple(pattern.index.shape)
        if differing := sorted(tensors.keys() ^ shapes.keys()):
            raise ValueError(f"expected the tensors of the model, {some(differing)} differs")
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                got = tuple(tensors[name].shape)
                raise ValueError(f"expected {name} of shape {shape}, got {got}")
    changed: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in smaller.items():
        module, _, parameter = name.rpartition(".")
        changed.setdefault(module, {})[parameter] = own[name].detach().new_empty(shape)
    install(model, changed, widths)
    blocks = {}
    for name, pattern in patterns.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        values = weight.new_empty(pattern.blocks, *pattern.block)
        blocks[name] = values, pattern if weight.is_meta else pattern.to(weight.device)
    install_blocks(model, blocks)
    own = model.state_dict(keep_vars=True)
    first = _first_names(model)
    state = {name: tensors[first[id(tensor)]] for name, tensor in own.items()}
    model.load_state_dict(state, assign=any(tensor.is_meta for tensor in own.values()))
    if changed or blocks:
        remember(model, Compaction())
    names = [name for name, _ in model.named_modules() if name in changed or name in blocks]
    return report("load_pruned", model, names)


def _first_names(model: nn.Module) -> dict[int, str]:
    """The names of the model's tensors by their identity: of tied ones the first."""
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    return names


def _block_sparse(model: nn.Module) -> dict[str, BlockSparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def _pattern(
    name: str, block: object, shape: tuple[int, ...], tensors: Mapping[str, torch.Tensor]
) -> BlockPattern:
    """The pattern of a layer; ValueError or TypeError unless the file's index is one."""
    if not isinstance(block, list) or [type(edge) for edge in block] != [int, int]:
        raise ValueError(f"{name}: expected a block of two sizes, got {block!r}")
    if f"{name}.index" not in tensors:
        raise ValueError(f"{name}: expected an index of its blocks, got none")
    try:
        return BlockPattern(
            tensors[f"{name}.index"], shape=(shape[0], shape[1]), block=(block[0], block[1])
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _expect_size(model: nn.Module, width: Width, size: object) -> None:
    largest = model.get_parameter(f"{width.reader}.weight").shape[1]
    if type(size) is not int or not 0 <= size <= largest or size % width.unit:
        what = f"a multiple of {width.unit} up to {largest}"
        raise ValueError(f"{width.reader}: expected a width of {what}, got {size!r}")


def _smaller(
    model: nn.Module, widths: Mapping[str, Width], sizes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that change with these widths, by their names."""
    shapes: dict[str, list[int]] = {}

    def of(name: str) -> list[int]:
        return shapes.setdefault(name, list(model.get_parameter(name).shape))

    for reader, size in sizes.items():
        if size != of(f"{reader}.weight")[1]:
            shapes[f"{reader}.weight"][1] = size
            for maker in widths[reader].makers:
                for own, _ in model.get_submodule(maker).named_parameters():
                    of(f"{maker}.{own}")[0] = size
    return {
        name: tuple(shape)
        for name, shape in shapes.items()
        if tuple(shape) != tuple(model.get_parameter(name).shape)
    }
