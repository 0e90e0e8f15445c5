"""The configs: what they refuse, and that JSON carries them."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyfastft as ft

NAMES = st.lists(st.sampled_from(["q", "k.proj", "layers.0.q", "h"]), min_size=1, unique=True)


@st.composite
def configs(draw: st.DrawFn) -> ft.LoRA:
    targets = draw(st.one_of(NAMES, st.sampled_from(["all-linear", r".*\.(q|k)"])))
    indexed = not isinstance(targets, str) and draw(st.booleans())
    return ft.LoRA(
        r=draw(st.integers(1, 64)),
        alpha=draw(st.floats(-1e6, 1e6)),
        dropout=draw(st.floats(0, 1)),
        targets=targets,
        exclude=draw(st.one_of(NAMES, st.just(()))),
        layers=draw(st.one_of(st.integers(0, 4), st.lists(st.integers(0, 4)))) if indexed else None,
        layers_pattern=draw(st.one_of(st.none(), NAMES)) if indexed else None,
        rank_pattern=draw(st.dictionaries(st.sampled_from(["q", r"h\.\d"]), st.integers(1, 9))),
        alpha_pattern=draw(st.dictionaries(st.sampled_from(["q", "k"]), st.floats(0, 9))),
        use_rslora=draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])),
        init=draw(st.sampled_from(["kaiming", "gaussian", "random"])),
        adapter_dtype=draw(st.sampled_from(["float32", "base"])),
    )


@given(configs())
def test_json_carries_it(config: ft.LoRA) -> None:
    again = ft.LoRA.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert copy.deepcopy(config) == config


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("r", 0, ValueError),
        ("r", 2.0, TypeError),
        ("r", True, TypeError),
        ("alpha", float("nan"), ValueError),
        ("alpha", 10**400, ValueError),
        ("alpha", "16", TypeError),
        ("dropout", 1.5, ValueError),
        ("dropout", -0.1, ValueError),
        ("targets", [], ValueError),
        ("targets", None, TypeError),
        ("targets", [3], TypeError),
        ("targets", "(", ValueError),
        ("exclude", 7, TypeError),
        ("layers", "0", TypeError),
        ("layers", [0.5], TypeError),
        ("rank_pattern", ["q"], TypeError),
        ("rank_pattern", {"q": 0}, ValueError),
        ("rank_pattern", {"(": 2}, ValueError),
        ("alpha_pattern", {"q": "2"}, TypeError),
        ("use_rslora", 1, TypeError),
        ("lora_bias", None, TypeError),
        ("bias", "some", ValueError),
        ("init", "pissa", ValueError),
        ("adapter_dtype", "float16", ValueError),
    ],
)
def test_refusals_name_the_field(field, value, error) -> None:
    beside = {"targets": ["q"]} if field == "layers" else {}
    with pytest.raises(error, match=rf"^{field}\b.*: expected .*, got "):
        ft.LoRA(**{**beside, field: value})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"targets": ["q"], "layers_pattern": "h"}, "layers"),
        ({"targets": "q", "layers": 1}, "layers"),
        ({"lora_bias": True, "init": "gaussian"}, "init"),
    ],
)
def test_refused_together(fields, named) -> None:
    with pytest.raises(ValueError, match=rf"^{named}: expected"):
        ft.LoRA(**fields)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^rang: expected one of .*, r, alpha"):
        ft.LoRA.from_dict({"rang": 3})


def test_it_is_frozen_and_keyword_only() -> None:
    config = ft.LoRA(r=4)
    with pytest.raises(AttributeError):
        config.r = 5
    with pytest.raises(TypeError):
        ft.LoRA(4)


TUNINGS = (
    ft.MaskedTuning(),
    ft.MaskedTuning(density=1, layout="blocks", block=8, passes=3, targets=["q"], layers=[1]),
    ft.MaskedTuning(method="sara"),
    ft.MaskedTuning(method="sara", density=0.01, exclude=["k"]),
)


@pytest.mark.parametrize("config", TUNINGS)
def test_json_carries_a_masked_tuning(config: ft.MaskedTuning) -> None:
    again = ft.MaskedTuning.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_what_a_masked_tuning_is_by_default() -> None:
    assert ft.MaskedTuning().density == 1e-3
    sara = ft.MaskedTuning(method="sara")
    assert (sara.density, sara.threshold) == (None, 2e-3)


@pytest.mark.parametrize(
    ("fields", "named", "error"),
    [
        ({"method": "lt-sft"}, "method", ValueError),
        ({"density": 0}, "density", ValueError),
        ({"density": 1.5}, "density", ValueError),
        ({"density": "all"}, "density", TypeError),
        ({"threshold": 0.1}, "threshold", ValueError),
        ({"layout": "hashed"}, "layout", ValueError),
        ({"block": 0}, "block", ValueError),
        ({"passes": 1.0}, "passes", TypeError),
        ({"method": "sara", "threshold": 0}, "threshold", ValueError),
        ({"method": "sara", "threshold": 0.1, "density": 0.1}, "density", ValueError),
        ({"method": "sara", "layout": "rows"}, "layout", ValueError),
        ({"method": "sara", "passes": 2}, "passes", ValueError),
        ({"targets": []}, "targets", ValueError),
    ],
)
def test_a_masked_tuning_refuses_by_the_name_of_the_field(fields, named, error) -> None:
    with pytest.raises(error, match=rf"^{named}: expected .*, got "):
        ft.MaskedTuning(**fields)
