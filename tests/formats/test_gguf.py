"""GGUF's 4-bit tensors: against blocks written byte by byte from the documented layout, against the
gguf package where it is installed, and headers that lie."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from pyfastft.formats import gguf as ours
from pyfastft.testing.tolerance import assert_exact

KINDS = {"Q4_0": 2, "Q4_1": 3, "Q4_K": 12}


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def drawn(kind: str, n: int, k: int, seed: int = 0) -> tuple[bytes, torch.Tensor]:
    """Blocks written byte by byte, and W in float64 from the documented formulas."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    def number() -> float:
        value = torch.randn((), generator=generator).item()
        return struct.unpack("<e", half(value))[0]

    raw, values = b"", []
    size = 256 if kind == "Q4_K" else 32
    for _ in range(n * k // size):
        if kind == "Q4_K":
            d, d_min = number(), number()
            scales, minima = integers(64, 8), integers(64, 8)
            packed = [0] * 12
            for j in range(8):
                if j < 4:
                    packed[j] |= scales[j]
                    packed[j + 4] |= minima[j]
                else:
                    packed[j + 4] |= scales[j] & 15 | (minima[j] & 15) << 4
                    packed[j - 4] |= scales[j] >> 4 << 6
                    packed[j] |= minima[j] >> 4 << 6
            codes = integers(16, 256)
            data = [0] * 128
            for j, code in enumerate(codes):
                chunk, place = divmod(j, 64)
                data[32 * chunk + place % 32] |= code << (4 if place >= 32 else 0)
            raw += half(d) + half(d_min) + bytes(packed) + bytes(data)
            for j, code in enumerate(codes):
                values.append(d * scales[j // 32] * code - d_min * minima[j // 32])
            continue
        d, m = number(), number()
        codes = integers(16, 32)
        data = [codes[j] | codes[j + 16] << 4 for j in range(16)]
        raw += half(d) + (half(m) if kind == "Q4_1" else b"") + bytes(data)
        values += [d * c + m if kind == "Q4_1" else d * (c - 8) for c in codes]
    return raw, torch.tensor(values, dtype=torch.float64).view(n, k)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file_of(tensors: dict[str, tuple[int, tuple[int, ...], bytes]], *, version: int = 3) -> bytes:
    """A GGUF file: tensors by name, of a kind and a shape as torch has it."""
    metadata = [
        text("general.architecture") + struct.pack("<I", 8) + text("test"),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("numbers") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 3.0),
        text("flag") + struct.pack("<I?", 7, True),
    ]
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(metadata)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        data += bytes(-len(data) % 32)
        head += struct.pack("<IQ", kind, len(data))
        data += raw
    return head + bytes(-len(head) % 32) + data


@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind: str, tmp_path: Path) -> None:
    n, k = 6, 512
    raw, truth = drawn(kind, n, k)
    other = torch.randn(5, 3)
    content = file_of(
        {
            "a.weight": (KINDS[kind], (n, k), raw),
            "norm": (0, (5, 3), other.numpy().tobytes()),
            "b.weight": (KINDS[kind], (2, 3, k), raw),
        }
    )
    (tmp_path / "m.gguf").write_bytes(content)
    layers = ours.load(tmp_path / "m.gguf")
    assert list(layers) == ["a.weight", "b.weight"]
    assert layers["a.weight"].equal(layers["b.weight"])
    weight = layers["a.weight"]
    assert weight.group_size == 32
    w = weight.dequantize().double()
    if kind == "Q4_0":
        assert_exact(w, truth, "W")
        assert bytes(ours.encode_q4_0(weight).tolist()) == raw
    else:
        # Scales and minima are exact; the zero-point, their quotient, is rounded once.
        bound = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (w - truth).abs().max() < bound


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
def test_blocks_of_one_value(kind: str) -> None:
    if kind == "Q4_1":
        raw = half(0.0) + half(-0.75) + bytes(range(16))
        weight = ours.decode(torch.tensor(list(raw), dtype=torch.uint8), kind, 1, 32)
        expected = torch.full((1, 32), -0.75)
    else:
        raw = half(0.5) + half(0.25) + bytes([0] * 4 + [3] * 4 + [0] * 4) + bytes(range(128))
        weight = ours.decode(torch.tensor(list(raw), dtype=torch.uint8), kind, 1, 256)
        expected = torch.tensor([[-0.75] * 128 + [0.0] * 128])
    assert_exact(weight.dequantize(), expected, "W")


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_gguf_package(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the peer is not installed")
    import numpy as np

    raw, _ = drawn(kind, 4, 512, seed=1)
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(4, -1)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test")
    number = gguf.GGMLQuantizationType(KINDS[kind])
    writer.add_tensor("w", rows, raw_dtype=number)
    writer.add_array("list", ["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weight = ours.load(tmp_path / "m.gguf")["w"]
    theirs = torch.from_numpy(gguf.quants.dequantize(rows, number)).float()
    if kind == "Q4_0":
        assert_exact(weight.dequantize(), theirs, "W")
    else:
        bound = 4 * torch.finfo(torch.float32).eps * theirs.abs().max()
        assert (weight.dequantize() - theirs).abs().max() < bound
    if kind != "Q4_K":
        w = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
        made = gguf.quants.quantize(w, number)
        read = ours.decode(torch.from_numpy(made.copy()).flatten(), kind, 4, 64)
        theirs = torch.from_numpy(gguf.quants.dequantize(made, number)).float()
        assert (read.dequantize() - theirs).abs().max() <= 4e-7 * theirs.abs().max()


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "expected the magic number"),
        (4, struct.pack("<I", 1), "expected version 2 or 3, got 1"),
        (4, struct.pack(">I", 3), "expected version 2 or 3"),
        (8, struct.pack("<Q", 2**60), r"expected 4 metadata and \d+ tensors, got"),
        (16, struct.pack("<Q", 2**63), "metadata and 1 tensors, got"),
        (24, struct.pack("<Q", 2**62), "expected a metadata key of 4611686018427387904 bytes"),
    ],
)
def test_headers_that_lie(at: int, value: bytes, message: str, tmp_path: Path) -> None:
    content = bytearray(file_of({"w": (2, (1, 32), drawn("Q4_0", 1, 32)[0])}))
    content[at : at + len(value)] = value
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
        ours.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ((2, (1, 33), b""), "rows of 32 weights"),
        ((12, (1, 128), b""), "rows of 256 weights"),
        ((2, (2**50, 32), b""), "weights at most"),
        ((2, (64, 32), bytes(18)), "to end at"),
        ((2, (), b""), "rows of 32 weights"),
        ((2, (1, 1, 1, 1, 32), bytes(18)), "of 4 dimensions"),
        ((2, (1, 32), half(float("nan")) + bytes(16)), "finite scales"),
    ],
)
def test_tensors_that_lie(info, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(file_of({"w": info}))
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
        ours.load(tmp_path / "m.gguf")
    with pytest.raises(FileNotFoundError, match="no such file"):
        ours.load(tmp_path / "other.gguf")
