"""Files of deltas: their bytes, their size, what is refused. Damaged ones: test_corrupted.py."""

from __future__ import annotations

import doctest
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import pyfastft as ft
from pyfastft import sparsity
from pyfastft.formats import _files, delta
from pyfastft.testing.tolerance import assert_exact


def by_hand(stream: bytes, count: int, end: int, low_bits: int) -> list[int]:
    """The code read bit by bit, as the derivation has it."""
    plane = -(-count // 8)

    def bit(first: int, i: int) -> int:
        return stream[first + i // 8] >> (i % 8) & 1

    numbers, place, first = [], 0, low_bits * plane
    while len(numbers) < count:
        if bit(first, place):
            i = len(numbers)
            low = sum(bit(j * plane, i) << j for j in range(low_bits))
            numbers.append(((place - i) << low_bits) + low)
        place += 1
    assert place <= count + (max(end - 1, 0) >> low_bits)
    return numbers


@pytest.mark.parametrize("end", [1, 7, 1000, 2**40])
@pytest.mark.parametrize("count", [0, 1, 5, 77, 700, 1000])
def test_numbers_come_back(end: int, count: int) -> None:
    count = min(count, end)
    chosen = torch.randperm(end)[:count] if end < 2**20 else torch.randint(end, (count,))
    numbers = torch.cat([chosen[2:], torch.tensor([0, end - 1])[:count]]).unique()
    stream, low_bits = delta.pack_numbers(numbers, end)
    assert_exact(delta.unpack_numbers(stream, len(numbers), end, low_bits), numbers)
    assert by_hand(bytes(stream.tolist()), len(numbers), end, low_bits) == numbers.tolist()


def test_bytes_of_more_numbers_are_refused() -> None:
    """Where the bytes are as many, the last one lies in what fills them up."""
    for count in range(2, 40):
        numbers = torch.arange(100 - count, 100)
        stream, low_bits = delta.pack_numbers(numbers, 100)
        with pytest.raises(ValueError, match="expected an index of"):
            delta.unpack_numbers(stream, count - 1, 100, low_bits)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5])
def test_an_index_is_near_its_entropy(density: float) -> None:
    end = 1 << 20
    numbers = torch.rand(end).lt(density).nonzero()[:, 0]
    stream, _ = delta.pack_numbers(numbers, end)
    p = torch.tensor(density, dtype=torch.float64)
    entropy = float(-(p.log2() + (1 - p) / p * (1 - p).log2()))
    assert entropy < 8 * len(stream) / len(numbers) < entropy + 1.1


def example() -> tuple[torch.Tensor, sparsity.SparseSet]:
    base = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    one = sparsity.elements(base.clone(), [3, 7, 20])
    one.write(torch.tensor([1.5, -2.0, 0.25]))
    return base, one


def test_a_file_has_these_bytes(tmp_path: Path) -> None:
    base, one = example()
    ft.save_delta({"layer.weight": one}, tmp_path / "a.delta")
    tensors = load_file(tmp_path / "a.delta")
    assert sorted(tensors) == ["layer.weight::index", "layer.weight::values"]
    assert_exact(tensors["layer.weight::values"], torch.tensor([1.5, -2, 0.25]).bfloat16())
    # One low bit each: 1, 1, 0; the others are 1, 3, 10, with ones at 1 + 0, 3 + 1 and 10 + 2.
    assert tensors["layer.weight::index"].tolist() == [0b011, 0b00010010, 0b00010000]
    with safe_open(tmp_path / "a.delta", framework="pt") as file:
        (text,) = file.metadata().values()
    digest, _, manifest = text.partition("\n")
    assert len(digest) == 64
    fingerprint = base.clone()
    fingerprint.view(-1)[[3, 7, 20]] = 0
    entry = {"shape": [4, 6], "dtype": "bfloat16", "layout": "element", "rows": 1, "columns": 1}
    entry |= {"fingerprint": digest_of(fingerprint), "index": "numbers", "low_bits": 1}
    assert json.loads(manifest) == {
        "version": 1,
        "kind": "absolute",
        "parameters": {"layer.weight": entry},
    }
    ft.save_delta({"layer.weight": one}, tmp_path / "b.delta")
    assert (tmp_path / "b.delta").read_bytes() == (tmp_path / "a.delta").read_bytes()


def digest_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes(tensor.view(torch.uint8).flatten().tolist())).hexdigest()


def test_the_smallest_index_is_written(tmp_path: Path) -> None:
    base = torch.randn(64, 32)
    base[::2] = 0
    makes = {
        "numbers": lambda w: sparsity.rows(w, [1, 5]),
        "all": sparsity.whole,
        "hashed": lambda w: sparsity.hashed(w, 50, 7),
        "nonzero": sparsity.nonzero,
    }
    for how, make in makes.items():
        ft.save_delta({"w": make(base.clone())}, tmp_path / how)
        with safe_open(tmp_path / how, framework="pt") as file:
            manifest = json.loads(file.metadata()["pyfastft.delta"].partition("\n")[2])
            names = file.keys()
        assert manifest["parameters"]["w"]["index"] == how
        assert ("w::index" in names) == (how == "numbers")


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 3.3), (torch.float32, 5.3)])
def test_a_trained_weight_takes_few_bytes(dtype: torch.dtype, most: float, tmp_path: Path) -> None:
    weight = torch.randn(1024, 1024).to(dtype)
    base = {"w": weight.clone()}
    one = sparsity.select([weight], 0.01, score="random")[0]
    one.write(torch.randn(len(one)))
    ft.save_delta({"w": one}, tmp_path / "task")
    assert os.path.getsize(tmp_path / "task") < most * len(one)
    half = ft.Delta.of({"w": one}).difference(base)
    ft.save_delta(half, tmp_path / "half", dtype=torch.bfloat16)
    assert os.path.getsize(tmp_path / "half") < 3.3 * len(one)
    kept = ft.load_delta(tmp_path / "half").changes["w"].values
    assert_exact(kept, half.changes["w"].values.bfloat16())


def test_what_is_not_written(tmp_path: Path) -> None:
    base, one = example()
    path = tmp_path / "task"
    absolute = ft.Delta.of({"w": one})
    difference = absolute.difference({"w": base})
    with pytest.raises(TypeError, match=r"save_delta: w: .* dtype bfloat16 in this kind of delta"):
        ft.save_delta(absolute, path, dtype=torch.float32)
    with pytest.raises(TypeError, match="dtype float32 or bfloat16"):
        ft.save_delta(difference, path, dtype=torch.float16)
    back = difference.apply({"w": base.clone()}, verify=False)
    with pytest.raises(ValueError, match="w: expected a base that is known"):
        ft.save_delta(back, path)
    one.write(torch.full((3,), float("inf")))
    with pytest.raises(ValueError, match="w: expected finite values"):
        ft.save_delta({"w": one}, path)
    assert not path.exists()


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, one = example()
    ft.save_delta({"w": one}, tmp_path / "task")
    before = (tmp_path / "task").read_bytes()
    one.write(torch.zeros(3))

    def broken(path: Path, content: bytes) -> None:
        path.write_bytes(content[:100])
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(_files, "_write_through", broken)
        with pytest.raises(OSError, match="no space"):
            ft.save_delta({"w": one}, tmp_path / "task")
    assert [path.name for path in tmp_path.iterdir()] == ["task"]
    assert (tmp_path / "task").read_bytes() == before
    ft.save_delta({"w": one}, tmp_path / "task")
    assert (tmp_path / "task").read_bytes() != before


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder().find(ft.save_delta, globs={"ft": ft, "torch": torch})
    (case,) = [one for one in found if one.examples]
    assert doctest.DocTestRunner().run(case).failed == 0
