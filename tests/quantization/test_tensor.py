"""QTensor4: what it refuses, what it stands for, and every way of copying and storing it."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pyfastft._codebook import TABLES
from pyfastft.quantization import QTensor4
from pyfastft.quantization.tensor import pack_codes, unpack_codes
from pyfastft.testing.tolerance import assert_exact

KINDS = (
    "symmetric",
    "integer",
    "float",
    "bfloat16",
    "permuted",
    "nf4",
    "fp4",
    "per-channel",
    "odd",
)


def drawn(kind: str, n: int = 6, k: int = 40, g: int = 16) -> QTensor4:
    k = 23 if kind == "odd" else k
    g = 1000 if kind == "per-channel" else g
    codes = torch.randint(16, (n, k), dtype=torch.uint8)
    grid = (n, -(-k // g))
    scale = torch.rand(grid) + 0.5
    scale = scale.bfloat16() if kind == "bfloat16" else scale
    zero = None
    if kind in ("integer", "permuted", "odd"):
        zero = torch.randint(16, grid, dtype=torch.uint8)
    elif kind in ("float", "bfloat16"):
        zero = (torch.rand(grid) * 15).to(scale.dtype)
    perm = torch.randperm(k, dtype=torch.int32) if kind == "permuted" else None
    codebook = kind if kind in TABLES else "int4"
    return QTensor4.from_codes(codes, scale, zero=zero, perm=perm, group_size=g, codebook=codebook)


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_stands_for(kind: str) -> None:
    """Element by element, as the class says."""
    weight = drawn(kind)
    codes, dense = weight.unpack(), weight.dequantize(torch.float32)
    assert dense.shape == weight.shape
    for n in range(weight.n):
        for j in range(weight.k):
            code, group = int(codes[n, j]), j // weight.group_size
            scale = weight.scale[n, group].float()
            if weight.codebook == "int4":
                zero = 8 if weight.zero is None else weight.zero[n, group].float()
                value = scale * (code - zero)
            else:
                value = scale * torch.tensor(TABLES[weight.codebook][code])
            k = j if weight.perm is None else int(weight.perm[j])
            assert dense[n, k] == value


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files(kind: str, tmp_path: Path) -> None:
    weight = drawn(kind)
    assert copy.deepcopy(weight).equal(weight)
    assert pickle.loads(pickle.dumps(weight)).equal(weight)
    torch.save({"w": weight}, tmp_path / "w.pt")
    assert torch.load(tmp_path / "w.pt", weights_only=True)["w"].equal(weight)
    save_file(weight.tensors(), tmp_path / "w.safetensors")
    assert QTensor4.from_tensors(load_file(tmp_path / "w.safetensors")).equal(weight)
    assert weight.to("cpu") is weight
    meta = weight.to("meta")
    assert meta.device.type == "meta"
    assert meta.scale.dtype is weight.scale.dtype
    assert not weight.equal(drawn(kind))


def test_it_is_immutable() -> None:
    weight = drawn("integer")
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.scale = weight.scale * 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del weight.codes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(0, 5), k=st.integers(0, 19), seed=st.integers(0, 99))
def test_packing(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (n, k), dtype=torch.uint8, generator=generator)
    packed = pack_codes(codes)
    assert packed.shape == (n, -(-k // 2))
    assert_exact(unpack_codes(packed, k), codes, "codes")
    for row in range(n):
        for j in range(k):
            assert int(packed[row, j // 2]) >> (4 * (j % 2)) & 15 == int(codes[row, j])


GOOD = {
    "codes": torch.zeros(2, 4, dtype=torch.uint8),
    "scale": torch.ones(2, 2),
    "k": 7,
    "group_size": 4,
}
BAD = {
    "codes-int": ({"codes": GOOD["codes"].int()}, TypeError, "codes of dtype uint8"),
    "codes-wide": ({"codes": torch.zeros(2, 5, dtype=torch.uint8)}, ValueError, r"shape \(N, 4\)"),
    "codes-spill": (
        {"codes": torch.full((2, 4), 0x11, dtype=torch.uint8)},
        ValueError,
        "0 in the unused half",
    ),
    "scale-half": ({"scale": torch.ones(2, 2).half()}, TypeError, "float32 or bfloat16"),
    "scale-shape": ({"scale": torch.ones(2, 3)}, ValueError, r"scale of shape \(2, 2\)"),
    "scale-nan": ({"scale": torch.full((2, 2), torch.nan)}, ValueError, "scale of finite values"),
    "scale-inf": ({"scale": torch.full((2, 2), torch.inf)}, ValueError, "scale of finite values"),
    "zero-16": (
        {"zero": torch.full((2, 2), 16, dtype=torch.uint8)},
        ValueError,
        "zero of values up to 15, got 16",
    ),
    "zero-int8": ({"zero": torch.ones(2, 2, dtype=torch.int8)}, TypeError, "uint8 or float32"),
    "zero-bf16": ({"zero": torch.ones(2, 2).bfloat16()}, TypeError, "uint8 or float32"),
    "zero-nan": ({"zero": torch.full((2, 2), torch.nan)}, ValueError, "zero of finite values"),
    "zero-nf4": (
        {"zero": torch.ones(2, 2), "codebook": "nf4"},
        ValueError,
        "zero of None beside nf4",
    ),
    "perm-long": ({"perm": torch.arange(7)}, TypeError, "perm of dtype int32"),
    "perm-short": ({"perm": torch.arange(6, dtype=torch.int32)}, ValueError, r"shape \(7,\)"),
    "perm-twice": (
        {"perm": torch.zeros(7, dtype=torch.int32)},
        ValueError,
        "a permutation of 0 to 6",
    ),
    "perm-out": (
        {"perm": torch.tensor([0, 1, 2, 3, 4, 5, 7], dtype=torch.int32)},
        ValueError,
        "a permutation of 0 to 6",
    ),
    "group-0": ({"group_size": 0}, ValueError, "group_size of at least 1, got 0"),
    "group-float": ({"group_size": 4.0}, TypeError, "group_size of type int"),
    "k-negative": ({"k": -1}, ValueError, "k of at least 0"),
    "codebook": ({"codebook": "int3"}, ValueError, "'int4' or 'nf4' or 'fp4', got 'int3'"),
    "codes-none": ({"codes": None}, TypeError, "codes of type Tensor, got NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_it_refuses(name: str) -> None:
    fields, error, message = BAD[name]
    QTensor4(**GOOD)
    with pytest.raises(error, match=f"QTensor4: expected .*{message}"):
        QTensor4(**{**GOOD, **fields})


def test_tensors_that_are_none_of_one() -> None:
    tensors = QTensor4(**GOOD).tensors()
    for name in ("codes", "scales", "layout"):
        fewer = {n: t for n, t in tensors.items() if n != name}
        with pytest.raises(ValueError, match=f"expected tensors of a tensor '{name}'"):
            QTensor4.from_tensors(fewer)
    with pytest.raises(ValueError, match="got other"):
        QTensor4.from_tensors({**tensors, "other": torch.ones(1)})
    for layout in ([7, 4, 3], [7, 4, -1], [7, 0, 0], [-7, 4, 0]):
        with pytest.raises(ValueError, match="QTensor4: expected"):
            QTensor4.from_tensors({**tensors, "layout": torch.tensor(layout)})


def test_a_damaged_pickle_is_checked() -> None:
    weight = drawn("permuted")
    buffer = io.BytesIO()
    broken = weight.perm.clone()
    torch.save(weight, buffer)
    content = buffer.getvalue()
    changed = broken.clone()
    changed[0] = 10**6
    assert content.count(broken.numpy().tobytes()) == 1
    content = content.replace(broken.numpy().tobytes(), changed.numpy().tobytes())
    with pytest.raises((ValueError, RuntimeError)):
        torch.load(io.BytesIO(content), weights_only=True)
