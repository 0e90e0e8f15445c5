"""Widths inside a model that can change without anything else seeing it.

A width is a number of units, attention heads or features, that some linear layers make and one
linear layer reads, with nothing between them but what treats every unit alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyfastft.nn._stand_in import why_not_kind, why_not_weight
from pyfastft.nn.block_sparse import BlockSparseLinear

# Models of transformers that are built as BERT is, and what their classes' names begin with.
BERTS = {
    "bert": "Bert",
    "camembert": "Camembert",
    "electra": "Electra",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
}
_BERT_MODULE = re.compile(r"transformers\.models\.(\w+)\.modeling_\1")
LINEAR = (nn.Linear, BlockSparseLinear)
_ELEMENTWISE = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh),
    *(nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU),
    *(nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink),
)


@dataclass(frozen=True)
class Width:
    """One width, its layers by name.

    Attributes:
        reader: the layer whose columns are the units'.
        makers: the layers whose rows are the units'; what the last one makes reaches the reader.
        between: what is applied to that on the way, elementwise; dropout left out.
        unit: rows of a maker, and columns of the reader, for each unit.
        attention: the module that counts the units as its heads, if they are heads.
    """

    reader: str
    makers: tuple[str, ...]
    between: tuple[nn.Module, ...] = ()
    unit: int = 1
    attention: nn.Module | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all its layers."""
        return (*self.makers, self.reader)


def widths_of(model: nn.Module) -> tuple[dict[str, Width], dict[str, str]]:
    """The model's widths by the names of their readers, and why other linear layers have none.

    A layer is an ``nn.Linear`` or a :class:`pyfastft.nn.BlockSparseLinear`. One whose Parameters
    stand in more than one place is in no width.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    whys: dict[str, str] = {}
    found = {}
    places: dict[int, list[str]] = {}
    for name, module in named.items():
        for own, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append(f"{name}.{own}")
    for width in [*_bert_widths(named, whys), *_sequential_widths(named, whys)]:
        faults = {name: _fault(named[name], places) for name in width.layers}
        whys |= {name: why for name, why in faults.items() if why}
        first = next((name for name, why in faults.items() if why), None)
        if first is None:
            found[width.reader] = width
        else:
            for name in width.layers:
                whys.setdefault(name, f"its width is also that of {first}, which is left alone")
    return found, whys


def count_heads(attention: nn.Module) -> None:
    """Make an attention's numbers those of its layers, as they are now."""
    value: Any = attention.value
    attention.all_head_size = value.out_features
    attention.num_attention_heads = value.out_features // attention.attention_head_size


def _fault(module: nn.Module, places: dict[int, list[str]]) -> str | None:
    """Why a layer's sizes cannot change; None where they can."""
    why = why_not_kind(module, LINEAR)
    if why is None and isinstance(module, nn.Linear):
        why = why_not_weight(module)
    if why is not None:
        return why
    for name, parameter in module.named_parameters(recurse=False):
        shared = places[id(parameter)]
        if len(shared) > 1:
            return f"its {name} is shared: it is {' and '.join(shared)}"
    return None


def _bert_widths(named: dict[str, nn.Module], whys: dict[str, str]) -> Iterator[Width]:
    """The heads and the feed-forward features of the layers of transformers' BERTs."""
    for name, module in named.items():
        inner = getattr(module, "self", None)
        kinds = ("SelfAttention", "CrossAttention")
        if _is_bert(module, "Attention") and any(_is_bert(inner, kind) for kind in kinds):
            if _is_bert(module.output, "SelfOutput"):
                yield Width(
                    f"{name}.output.dense",
                    tuple(f"{name}.self.{part}" for part in ("query", "key", "value")),
                    unit=inner.attention_head_size,  # type: ignore[union-attr, arg-type]
                    attention=inner,
                )
        elif _is_bert(module, "Layer"):
            middle, output = module.get_submodule("intermediate"), module.get_submodule("output")
            if not (_is_bert(middle, "Intermediate") and _is_bert(output, "Output")):
                continue
            maker = f"{name}.intermediate.dense"
            activation: Any = middle.intermediate_act_fn
            if isinstance(activation, nn.Module) and _is_elementwise(activation):
                yield Width(f"{name}.output.dense", (maker,), between=(activation,))
            else:
                whys[maker] = f"{_kind(activation)}, after it, is not known to be elementwise"


def _is_bert(module: object, part: str) -> bool:
    """Whether a module is this part of one of the BERTs, and computes as its class does."""
    kind = type(module)
    found = _BERT_MODULE.fullmatch(kind.__module__)
    return (
        found is not None
        and kind.__name__ == f"{BERTS.get(found[1])}{part}"
        and "forward" not in vars(module)
    )


def _sequential_widths(named: dict[str, nn.Module], whys: dict[str, str]) -> Iterator[Width]:
    """What stands between two linear layers of a Sequential, however its parts are nested."""
    inner: set[str] = set()
    for name, module in named.items():
        if not _is_sequential(module) or name in inner:
            continue
        maker: str | None = None
        between: list[nn.Module] = []
        stopped: nn.Module | None = None
        for child, part in _parts(name, module, inner):
            if isinstance(part, LINEAR):
                if maker is not None and stopped is None:
                    yield Width(child, (maker,), between=tuple(between))
                elif maker is not None:
                    whys[maker] = f"{_kind(stopped)} stands between it and {child}"
                maker, between, stopped = child, [], None
            elif _is_elementwise(part):
                between.append(part)
            elif type(part) is not nn.Dropout:
                stopped = stopped or part


def _parts(name: str, module: nn.Module, inner: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a Sequential in order, those of nested ones in their places."""
    for key, part in module._modules.items():
        child = f"{name}.{key}" if name else key
        assert part is not None
        if _is_sequential(part):
            inner.add(child)
            yield from _parts(child, part, inner)
        else:
            yield child, part


def _is_sequential(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and "forward" not in vars(module)


def _is_elementwise(module: nn.Module) -> bool:
    """Whether a module maps each element alone, all of them alike."""
    kind = type(module)
    known = kind in _ELEMENTWISE or kind.__module__ == "transformers.activations"
    return known and not any(module._parameters) and "forward" not in vars(module)


def _kind(thing: object) -> str:
    return type(thing).__name__ if isinstance(thing, nn.Module) else repr(thing)
