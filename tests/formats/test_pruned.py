"""Files of compacted models: back bit for bit, or a clear error and nothing changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load, save
from torch import nn

import pyfastft as ft
from pyfastft.formats._manifest import sha256_of_content
from pyfastft.testing.tolerance import assert_exact

KEY = "pyfastft.pruned"
TOKENS = torch.arange(4, 24).view(2, 10)


def bert() -> nn.Module:
    """With an output head whose weight is the embedding's."""
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=12,
        max_position_embeddings=32,
    )
    return transformers.BertForMaskedLM(config).eval()


@torch.no_grad()
def compacted() -> nn.Module:
    model = bert()
    for number, layer in enumerate(model.bert.encoder.layer):
        value = layer.attention.self.value.weight
        value[: 4 * (number + 1)] = 0
        layer.intermediate.dense.weight[: 5 * number + 1] = 0
        layer.output.dense.bias.normal_()
    last = model.bert.encoder.layer[1].intermediate.dense
    last.weight[:] = 0
    ft.compact(model)
    return model


def test_a_model_of_different_widths_comes_back_bit_for_bit(tmp_path) -> None:
    model = compacted()
    path = tmp_path / "small.safetensors"
    ft.save_pruned(model, path)
    other = bert()
    report = ft.load_pruned(other, path)
    assert len(report.changed) == 12
    assert report.total == sum(p.numel() for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert_exact(other.state_dict()[name], tensor, name)
    assert_exact(other(TOKENS).logits, model(TOKENS).logits)
    assert str(other) == str(model)
    decoder = other.cls.predictions.decoder.weight
    assert decoder is other.bert.embeddings.word_embeddings.weight
    assert [layer.attention.self.num_attention_heads for layer in other.bert.encoder.layer] == [
        3,
        2,
    ]
    assert not ft.compact(other).changed
    with pytest.raises(ValueError, match=r"what compact\(\) took out was given up"):
        ft.revert(other)
    assert not ft.load_pruned(other, path).changed  # as wide as the file already


def test_the_file_is_an_ordinary_one(tmp_path) -> None:
    model = compacted()
    ft.save_pruned(model, tmp_path / "small")
    tensors = load((tmp_path / "small").read_bytes())
    state = model.state_dict()
    assert state.keys() - tensors.keys() == {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    }
    for name, tensor in tensors.items():
        assert_exact(tensor, state[name], name)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_model_on_the_meta_device_gets_what_the_file_holds(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).bfloat16()
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    ft.compact(model)
    ft.save_pruned(model, tmp_path / "small")
    ft.load_pruned(other, tmp_path / "small")
    x = torch.randn(5, 3, dtype=torch.bfloat16)
    assert_exact(other(x), model(x))
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"save_pruned: expected .* data, 0.weight, .* on meta"),
    ):
        ft.save_pruned(nn.Sequential(nn.Linear(3, 4)), tmp_path / "none")


def forged(manifest: object, tensors: dict[str, torch.Tensor]) -> bytes:
    """A file that states the right sha256 of whatever it holds."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    return save(tensors, metadata={KEY: f"{sha256_of_content(text, tensors)}\n{text}"})


def test_files_that_cannot_be_right_change_nothing(tmp_path: Path) -> None:
    path, model, reader = tmp_path / "small", compacted(), "bert.encoder.layer.0.output.dense"
    heads = "bert.encoder.layer.0.attention.output.dense"
    ft.save_pruned(model, path)
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    text = json.loads(good[8 : 8 + size])["__metadata__"][KEY].partition("\n")[2]
    widths, tensors = json.loads(text)["widths"], load(good)
    weight = f"{reader}.weight"

    manifest = {"version": 1, "widths": widths, "blocks": {}}

    def of(**changes: object) -> bytes:
        return forged(manifest | {"widths": widths | changes}, tensors)

    cases = [
        (good[:-1], "expected a safetensors file"),
        (good[:40], "expected a safetensors file"),
        (good[:-1] + bytes([good[-1] ^ 1]), "expected content of the sha256"),
        (save(tensors), f"expected a pruned model, got a safetensors file without {KEY}"),
        (forged("[]", tensors), "expected a JSON object"),
        (
            forged(manifest | {"version": 2}, tensors),
            "expected version 1, got 2",
        ),
        (
            forged(manifest | {"widths": []}, tensors),
            "expected widths of type dict",
        ),
        (forged(manifest | {"widths": {}}, tensors), "expected bert.* of shape"),
        (of(nothing=1), "nothing: expected a layer whose width can change, the model has no such"),
        (of(**{heads: 13}), f"{heads}: expected a width of a multiple of 4 up to 16, got 13"),
        (of(**{heads: 8}), rf"expected .* of shape \({8}"),
        (of(**{reader: -1}), "expected a width of a multiple of 1 up to 12, got -1"),
        (of(**{reader: 10**30}), "expected a width of a multiple of 1 up to 12, got 10000"),
        (of(**{reader: True}), "expected a width of .* got True"),
        (of(**{reader: 12}), r"expected .* of shape \(12"),
        (
            forged(manifest, tensors | {"more": torch.ones(1)}),
            "expected the tensors of the model, more differs",
        ),
        (
            forged(
                {"version": 1, "widths": widths, "blocks": {}},
                {n: t for n, t in tensors.items() if n != weight},
            ),
            f"expected the tensors of the model, {weight} differs",
        ),
        (
            forged(
                {"version": 1, "widths": widths, "blocks": {}},
                tensors | {weight: tensors[weight].T.contiguous()},
            ),
            rf"expected {weight} of shape \(16, 11\), got \(11, 16\)",
        ),
    ]
    other = bert()
    parameters, state = dict(other.named_parameters()), copy.deepcopy(other.state_dict())
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"small: .*{message}"):
            ft.load_pruned(other, path)
        assert all(p is parameters[name] for name, p in other.named_parameters())
        for name, tensor in other.state_dict().items():
            assert_exact(tensor, state[name], name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        ft.load_pruned(other, tmp_path / "nothing")
    path.write_bytes(good)
    ft.load_pruned(other, path)


def blocks_of(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """A compacted model, one layer of it made of blocks."""
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    with torch.no_grad():
        model[0].weight[:8, 8:] = 0
        model[2].weight[:, 20:] = 0
    monkeypatch.setattr("pyfastft.pruning.compaction.is_faster", lambda *_: True)
    ft.compact(model, block=8)
    assert isinstance(model[0], ft.nn.BlockSparseLinear)
    assert type(model[2]) is nn.Linear
    return model


def test_layers_made_of_blocks_come_back(tmp_path, monkeypatch) -> None:
    model, path, x = blocks_of(monkeypatch), tmp_path / "small", torch.randn(5, 16)
    ft.save_pruned(model, path)
    for device in ("cpu", "meta"):
        with torch.device(device):
            other = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        assert ft.load_pruned(other, path).changed == ("0", "2")
        assert_exact(other(x), model(x))
        for name, tensor in model.state_dict().items():
            assert_exact(other.state_dict()[name], tensor, name)
        assert str(other) == str(model)
        with pytest.raises(ValueError, match="expected model of dense layers, got blocks in 0"):
            ft.load_pruned(other, path)


def test_blocks_that_cannot_be_right_change_nothing(tmp_path, monkeypatch) -> None:
    path = tmp_path / "small"
    ft.save_pruned(blocks_of(monkeypatch), path)
    tensors = load(path.read_bytes())
    index = tensors["0.index"]
    other = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    for blocks, changes, message in (
        ({"0": [8, 8]}, {"0.index": index.flip(0)}, "0: BlockPattern: expected index"),
        ({"0": [8, 8]}, {"0.index": index.long()}, "0: BlockPattern: expected index of dtype"),
        ({"0": [8, 8]}, {"0.values": torch.zeros(4, 8, 8)}, "expected 0.values of shape"),
        ({"0": [8, 0]}, {}, "0: BlockPattern: expected block of two sizes"),
        ({"0": 8}, {}, "0: expected a block of two sizes, got 8"),
        ({"2": [8, 8]}, {}, "2: expected an index of its blocks, got none"),
        ({"1": [8, 8]}, {}, "1: expected a layer that can be made of blocks, the model has no"),
        ({}, {}, "expected the tensors of the model, 0.index, 0.values, 0.weight differs"),
    ):
        manifest = {"version": 1, "widths": {"2": 20}, "blocks": blocks}
        path.write_bytes(forged(manifest, tensors | changes))
        with pytest.raises(ValueError, match=f"small: {message}"):
            ft.load_pruned(other, path)
        assert [type(layer) for layer in other] == [nn.Linear, nn.ReLU, nn.Linear]
        assert other[0].weight.shape == (24, 16)


def test_models_that_have_something_to_lose_are_refused(tmp_path: Path) -> None:
    model, path = compacted(), tmp_path / "small"
    ft.save_pruned(model, path)
    kept = bert()
    with torch.no_grad():
        kept.bert.encoder.layer[0].output.dense.weight[:, 0] = 0
    ft.compact(kept, keep_original="cpu")
    with pytest.raises(ValueError, match="load_pruned: the model keeps its original weights"):
        ft.load_pruned(kept, path)
    ft.convert(model, ft.LoRA(r=2))
    for call in (ft.save_pruned, ft.load_pruned):
        with pytest.raises(ValueError, match=f"{call.__name__}: the model has adapters already"):
            call(model, path)
