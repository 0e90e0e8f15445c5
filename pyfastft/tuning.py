"""Converting a model in place to train some entries of its weights, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyfastft import sparsity
from pyfastft._check import reject
from pyfastft._modules import expect_unconverted, replace
from pyfastft._report import Report, report
from pyfastft._targets import plan, untied
from pyfastft.config import MaskedTuning
from pyfastft.nn.masked import MaskedLinear
from pyfastft.sparsity.calibration import Loss, select_by_gradient

__all__ = ["is_tuned", "restore", "tune"]

_RECORD = "_pyfastft_tuning"


@dataclass(frozen=True)
class Tuning:
    """What a model that trains in part remembers: its config, and what trained before."""

    config: MaskedTuning
    requires_grad: dict[str, bool]


def tune(
    model: nn.Module,
    config: MaskedTuning,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Report:
    """See :func:`pyfastft.convert`."""
    expect_unconverted(model, "convert")
    if config.method == "saft" and calibration is None:
        because = "to choose what trains by its gradient"
        reject("convert", "calibration", "batches", "None", because=because, error=TypeError)
    if config.method != "saft" and (calibration is not None or loss is not None):
        because = f"where method={config.method!r} looks at the weights alone"
        reject("convert", "calibration and loss", "None", "others", because=because)
    planned = plan(model, config, why_not=why_not(config))
    modules, skipped = untied(model, planned.modules)
    skipped = {**planned.skipped, **skipped}
    weights: dict[str, nn.Parameter] = {}
    for name, module in modules.items():
        weight = module._parameters["weight"]
        if all(weight is not other for other in weights.values()):
            assert weight is not None
            weights[name] = weight
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    if not weights:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5])
        reject("convert", "targets", "weights that can train in part", f"none ({reasons})")
    try:
        layers, left = _layers(modules, _choose(model, config, weights, calibration, loss))
    except BaseException:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        raise
    model.requires_grad_(False)
    replace(model, {layer.base: layer for layer in layers.values()})
    for layer in layers.values():
        layer.take_over()
        layer.values.requires_grad_(True)
    setattr(model, _RECORD, Tuning(config, flags))
    return report("convert", model, layers, {**skipped, **left})


def restore(model: nn.Module, *, weights: str) -> Report:
    """See :func:`pyfastft.revert`."""
    inner = next(module for module in model.modules() if _RECORD in module.__dict__)
    record: Tuning = inner.__dict__[_RECORD]
    layers = {n: m for n, m in inner.named_modules() if isinstance(m, MaskedLinear)}
    if weights == "original":
        for layer in layers.values():
            layer.trained.restore()
    replace(inner, {layer: layer.restore() for layer in layers.values()})
    for name, parameter in inner.named_parameters():
        if name in record.requires_grad:
            parameter.requires_grad_(record.requires_grad[name])
    delattr(inner, _RECORD)
    return report("revert", inner, layers)


def is_tuned(model: nn.Module) -> bool:
    """Whether :func:`tune` changed the model, or one inside it."""
    return any(_RECORD in module.__dict__ for module in model.modules())


def why_not(config: MaskedTuning) -> Callable[[nn.Module], str | None]:
    """What says why the config cannot train a module, or None where it can."""

    def why(module: nn.Module) -> str | None:
        return MaskedLinear.why_not(module) or _why_not_tiled(module, config)

    return why


def _why_not_tiled(module: nn.Module, config: MaskedTuning) -> str | None:
    n, k = module.weight.shape  # type: ignore[misc, operator]
    if config.layout != "blocks" or not (n % config.block or k % config.block):
        return None
    return f"blocks of {config.block} do not tile its weight {n} x {k}"


def _layers(
    modules: Mapping[str, nn.Module], chosen: Mapping[str, sparsity.SparseSet]
) -> tuple[dict[str, MaskedLinear], dict[str, str]]:
    """The new layers by name, and why the other modules get none."""
    sets = {one.weight: one for one in chosen.values()}
    layers, left = {}, {}
    for name, module in modules.items():
        one = sets.get(module._parameters["weight"])  # type: ignore[arg-type]
        if one is None:
            left[name] = "the loss does not depend on it"
        elif not len(one):
            left[name] = "none of its entries was chosen"
        else:
            one.keep_origin()
            layers[name] = MaskedLinear(module, one)
    if not layers:
        reject("convert", "density or threshold", "a choice of one entry or more", "none")
    return layers, left


def _choose(
    model: nn.Module,
    config: MaskedTuning,
    weights: Mapping[str, nn.Parameter],
    calibration: Iterable[Any] | None,
    loss: Loss | None,
) -> dict[str, sparsity.SparseSet]:
    """The sets by the names of the weights; of those that the loss ignores, none."""
    if config.method == "saft":
        assert calibration is not None
        assert config.density is not None
        return select_by_gradient(
            model,
            weights,
            calibration,
            loss,
            density=config.density,
            passes=config.passes,
            layout=config.layout,
            block=config.block,
        )
    if config.density is not None:
        kinds = {(weight.device, weight.dtype) for weight in weights.values()}
        if len(kinds) > 1:
            reject("convert", "targets", "one device and dtype", sorted(map(str, kinds)))
        sets = sparsity.select(list(weights.values()), config.density, largest=False)
        return dict(zip(weights, sets, strict=True))
    assert config.threshold is not None
    return {
        name: sparsity.elements(weight, weight.detach().abs() < config.threshold)
        for name, weight in weights.items()
    }
