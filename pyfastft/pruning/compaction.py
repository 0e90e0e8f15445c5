"""A pruned model made smaller in place, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pyfastft import functional
from pyfastft._check import expect_dtype, expect_shape, reject
from pyfastft._modules import expect_unconverted, replace
from pyfastft._report import Report, report
from pyfastft.formats._files import file_of_originals, naming, read_exactly, write_tensors
from pyfastft.nn.block_sparse import BlockSparseLinear
from pyfastft.pruning.pattern import BlockPattern
from pyfastft.pruning.structures import LINEAR, Width, count_heads, widths_of

__all__ = ["compact", "is_compacted", "restore"]

_RECORD = "_pyfastft_compaction"
# Of the dense layer's time: what less than this saves is lost again in slower spells.
_WORTH = 0.9


@dataclass
class Compaction:
    """What a compacted model remembers.

    Attributes:
        originals: the changed layers' Parameters by module and name, their data on the CPU or
            empty; None where not kept.
        modules: the changed layers.
        file: what holds their data, if a file does.
    """

    originals: dict[str, dict[str, nn.Parameter]] | None = None
    modules: dict[str, nn.Module] = field(default_factory=dict)
    file: Path | None = None


def compact(
    model: nn.Module,
    *,
    keep_original: Literal["cpu"] | str | os.PathLike[str] | None = None,
    block: int | None = 32,
    tokens: int = 512,
) -> Report:
    r"""Take out of a model, in place, the attention heads and features that pruning has made zero.

    With units u of a width, their rows :math:`W_u, b_u` in the layer that makes them, an activation
    a and their columns :math:`V_u` in the layer that reads them, the reader computes

    .. math:: y = c + \sum_u a(x W_u^T + b_u) V_u^T

    A unit with :math:`V_u = 0` is taken out. One with :math:`W_u = 0` is the constant
    :math:`a(b_u)`: it is taken out, and :math:`a(b_u) V_u^T` is added to c, in float64 and rounded
    once. For a head, W and b are those of its values, and a is the identity, because the weights
    of attention sum to 1; zero queries or keys alone are uniform attention, which stays. What
    becomes constant or unread by that is taken out in turn.

    Known are the heads and the feed-forward features of transformers' BERT, RoBERTa, XLM-RoBERTa,
    CamemBERT and ELECTRA, and the features between two linear layers of an ``nn.Sequential`` with
    elementwise activations and dropout between them. Everything else stays as it is. The linear
    layers stay the same modules, with new, smaller Parameters, each layer of its own width; an
    optimizer is to be made after this.

    Then those of these layers whose weights still have blocks of zeros become
    :class:`pyfastft.nn.BlockSparseLinear` where that is measured, here and now, to take at most
    0.9 of the dense layer's time. Layers of one shape and about one density are measured once.

    Args:
        model: any module; one that was compacted already changes only where more became zero.
        keep_original: what :func:`pyfastft.revert` needs: ``"cpu"`` keeps the changed layers'
            weights in the CPU's memory, anything else is a path to a safetensors file to write
            them to, which must not be there yet. By default they are given up.
        block: edge of these blocks; None leaves every layer dense.
        tokens: how many tokens a layer sees in the calls that are to be fast.

    Returns:
        The linear layers that are smaller or made of blocks, and why the others are as they were.

    Raises:
        ValueError: the model has adapters, trains in part, or keeps the originals of an earlier
            compaction; or block or tokens is below 1.
        FileExistsError: ``keep_original`` is there already.

    Note:
        Outputs are those of the pruned model in evaluation. In training, dropout draws others; and
        where it stood on a constant, the constant came and went, but now is always there. A query
        that may attend to nothing has attention weights that do not sum to 1 on some backends; it
        then gets a constant head's share all the same. The file of a compacted model is
        :func:`pyfastft.save_pruned`'s: its config still has the old widths.

    Reference:
        Lagunas et al. 2021, "Block Pruning For Faster Transformers", section 5.
    """
    expect_unconverted(model, "compact")
    for arg, value in (("block", 1 if block is None else block), ("tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            reject("compact", arg, "at least 1", repr(value))
    file = file_of_originals(keep_original)
    widths, whys = widths_of(model)
    named = dict(model.named_modules())
    new, left = _shrunk(named, widths)
    blocks = {} if block is None else _blocks(named, widths, new, block, tokens)
    changed = [name for name in named if name in new or name in blocks]
    if changed:
        modules = {name: named[name] for name in changed}
        record = _record(model, keep_original, file, modules)
        # The bias of what is made of blocks alone is a new one as well, apart from the original.
        for name in blocks.keys() - new.keys():
            new[name] = {n: p.detach().clone() for n, p in modules[name].named_parameters()}
        install(model, new, widths)
        install_blocks(model, blocks)
        _let_go(record)
        remember(model, record)
    known = {name for width in widths.values() for name in width.layers}
    skipped = {
        name: whys.get(name) or left.get(name) or _default(name in known)
        for name, module in named.items()
        if isinstance(module, LINEAR) and name not in changed
    }
    return report("compact", model, changed, skipped)


def install(
    model: nn.Module,
    new: Mapping[str, Mapping[str, torch.Tensor]],
    widths: Mapping[str, Width],
) -> None:
    """Give layers Parameters over these tensors, by module and name; the model has the widths."""
    for name, tensors in new.items():
        module = model.get_submodule(name)
        for own, tensor in tensors.items():
            trains = module.get_parameter(own).requires_grad
            module._parameters[own] = nn.Parameter(tensor, requires_grad=trains)
        _fit(module)
    for width in widths.values():
        if width.attention is not None:
            count_heads(width.attention)


def install_blocks(
    model: nn.Module, blocks: Mapping[str, tuple[torch.Tensor, BlockPattern]]
) -> None:
    """Put layers of these values and patterns in the places of the layers of these names."""
    layers: dict[nn.Module, nn.Module] = {}
    for name, (values, pattern) in blocks.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layers[base] = BlockSparseLinear.in_place_of(base, values, pattern)
    replace(model, layers)


def remember(model: nn.Module, record: Compaction) -> None:
    """Give a compacted model its record."""
    setattr(model, _RECORD, record)


def expect_nothing_kept(model: nn.Module, caller: str) -> None:
    """ValueError where the model keeps the originals of a compaction."""
    for module in model.modules():
        record = module.__dict__.get(_RECORD)
        if record is not None and record.originals is not None:
            raise ValueError(f"{caller}: the model keeps its original weights, revert it first")


def is_compacted(model: nn.Module) -> bool:
    """Whether :func:`compact` changed the model, or one inside it."""
    return any(_RECORD in module.__dict__ for module in model.modules())


def restore(model: nn.Module) -> Report:
    """See :func:`pyfastft.revert`."""
    inner = next(module for module in model.modules() if _RECORD in module.__dict__)
    record: Compaction = inner.__dict__[_RECORD]
    if record.originals is None:
        raise ValueError(
            "revert: what compact() took out was given up; compact with keep_original='cpu' or a "
            "path to get it back"
        )
    stored = _stored(record)
    named = dict(inner.named_modules())
    for name, module in record.modules.items():
        device = next(named[name].parameters()).device
        for own, parameter in record.originals[name].items():
            parameter.data = stored[f"{name}.{own}"].to(device)
            module._parameters[own] = parameter
        _fit(module)
        module.train(named[name].training)
    replace(inner, {named[name]: module for name, module in record.modules.items()})
    for width in widths_of(inner)[0].values():
        if width.attention is not None:
            count_heads(width.attention)
    delattr(inner, _RECORD)
    return report("revert", inner, record.originals)


def _default(known: bool) -> str:
    return "no unit of it is constant or unread" if known else "its widths are seen elsewhere"


def _shrunk(
    named: Mapping[str, nn.Module], widths: Mapping[str, Width]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """The new tensors of every layer that changes, by its name, and what kept units in others."""
    now: dict[str, dict[str, torch.Tensor]] = {}
    left: dict[str, str] = {}

    def of(name: str) -> dict[str, torch.Tensor]:
        return now.get(name) or {n: p.detach() for n, p in named[name].named_parameters()}

    # What one width loses can make units of the next constant, and of the one before unread.
    shrinking = True
    while shrinking:
        shrinking = False
        for name, width in widths.items():
            if any(isinstance(named[one], BlockSparseLinear) for one in width.layers):
                left |= dict.fromkeys(width.layers, "its width has a layer made of blocks")
                continue
            maker, reader = of(width.makers[-1]), of(name)
            if maker["weight"].is_meta:
                left[name] = "its weight is on the meta device"
                continue
            constant = _constants(maker, width)
            silent = _by_unit(~maker["weight"].any(1) & constant.isfinite(), width)
            unread = _by_unit(~reader["weight"].any(0), width)
            taken_in = silent & ~unread
            if "bias" not in reader:
                held = taken_in & ~_by_unit(constant == 0, width)
                silent = silent & ~held
                if bool(held.any()):
                    left[name] = f"it has no bias to take {int(held.sum())} constants into"
            kept = ~(silent | unread)
            if bool(kept.all()):
                continue
            shrinking = True
            rows = kept.repeat_interleave(width.unit).nonzero()[:, 0]
            if "bias" in reader:
                folded = taken_in.repeat_interleave(width.unit)
                share = reader["weight"][:, folded].double() @ constant[folded].double()
                bias = reader["bias"]
                reader["bias"] = (bias.double() + share).to(bias.dtype)
            reader["weight"] = reader["weight"][:, rows]
            now[name] = reader
            for one in width.makers:
                now[one] = {own: tensor[rows] for own, tensor in of(one).items()}
    return now, left


def _blocks(
    named: Mapping[str, nn.Module],
    widths: Mapping[str, Width],
    new: Mapping[str, Mapping[str, torch.Tensor]],
    block: int,
    tokens: int,
) -> dict[str, tuple[torch.Tensor, BlockPattern]]:
    """The values and patterns of the layers that are faster by their blocks, by name."""
    blocks = {}
    found: dict[tuple[Any, ...], bool] = {}
    for name in dict.fromkeys(name for width in widths.values() for name in width.layers):
        module = named[name]
        if not isinstance(module, nn.Linear) or module.weight.is_meta:
            continue
        weight = new[name]["weight"] if name in new else module.weight.detach()
        if min(weight.shape) < block:
            continue
        pattern = BlockPattern.from_weight(weight, block=(block, block))
        if pattern.density < 1:
            kind = (weight.shape, weight.dtype, weight.device, round(pattern.density, 1))
            if kind not in found:
                found[kind] = is_faster(weight, pattern, tokens)
            if found[kind]:
                blocks[name] = pattern.values(weight), pattern
    return blocks


def is_faster(weight: torch.Tensor, pattern: BlockPattern, tokens: int) -> bool:
    """Whether the blocks of a weight take at most 0.9 of its time, measured in turns."""
    from pyfastft.planning import medians

    generator = torch.Generator(weight.device).manual_seed(0)
    x = weight.new_empty(tokens, weight.shape[1]).normal_(generator=generator)
    values = pattern.values(weight)
    times = medians(
        {
            "dense": lambda: nn.functional.linear(x, weight),
            "blocks": lambda: functional.block_sparse_linear(x, values, pattern),
        },
        weight.device,
    )
    return times["blocks"] <= _WORTH * times["dense"]


def _constants(maker: Mapping[str, torch.Tensor], width: Width) -> torch.Tensor:
    """What the reader gets of each row of the maker where that is zero, computed as the model
    does."""
    constant = maker.get("bias", maker["weight"].new_zeros(len(maker["weight"])))
    with torch.no_grad():
        for module in width.between:
            constant = module.forward(constant)  # the hooks are not meant
    return constant


def _by_unit(lines: torch.Tensor, width: Width) -> torch.Tensor:
    """Of each unit whether all of its lines are so."""
    return lines.view(-1, width.unit).all(1)


def _fit(module: nn.Module) -> None:
    module.out_features, module.in_features = module.weight.shape  # type: ignore[misc, assignment]


def _record(
    model: nn.Module,
    keep_original: str | os.PathLike[str] | None,
    file: Path | None,
    modules: Mapping[str, nn.Module],
) -> Compaction:
    """What the model is to remember; in the file, if there is one, what these modules hold."""
    expect_nothing_kept(model, "compact")
    if keep_original is None:
        return Compaction()
    originals = {name: dict(module.named_parameters()) for name, module in modules.items()}
    if file is not None:
        write_tensors(file, {name: p.detach() for name, p in _flat(originals).items()})
    return Compaction(originals, dict(modules), None if file is None else file.resolve())


def _let_go(record: Compaction) -> None:
    """Leave the originals what is to be kept of them."""
    for parameter in _flat(record.originals or {}).values():
        empty = record.file is not None
        data = parameter.data
        # One element, in the shape of all, which a file is compared with later.
        parameter.data = data.new_empty(()).expand(data.shape) if empty else data.cpu()


def _flat(originals: Mapping[str, Mapping[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    return {f"{name}.{own}": p for name, layer in originals.items() for own, p in layer.items()}


def _stored(record: Compaction) -> dict[str, torch.Tensor]:
    """The data of the originals by name."""
    originals = _flat(record.originals or {})
    if record.file is None:
        return {name: parameter.data for name, parameter in originals.items()}
    stored = read_exactly(record.file, originals)
    with naming(record.file):
        for name, parameter in originals.items():
            expect_shape("revert", name, stored[name], parameter.shape, "as it was")
            expect_dtype("revert", name, stored[name], (parameter.dtype,), "as it was")
    return stored
