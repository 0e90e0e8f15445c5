"""Damaged files: every one is refused in words that name the file, and nothing else happens.

Each format gets 200 files that cannot be right (cut short, headers that lie, tensors that are
missing, of another shape or dtype, or hold impossible values) and 200 with bytes of the header
changed, which may still make sense but must never end in anything but a ValueError or weights.
"""

from __future__ import annotations

import json
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

import pyfastft as ft
from pyfastft import sparsity
from pyfastft.formats import (
    _manifest,
    awq,
    bitsandbytes,
    checkpoint,
    compressed_tensors,
    delta,
    gguf,
    gptq,
)
from pyfastft.quantization import QTensor4

COUNT = 200
FORMATS = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "pyfastft")


def weight(**fields) -> QTensor4:
    codes = torch.randint(16, (16, 64), dtype=torch.uint8)
    scale = (torch.rand(16, 4) + 0.5).half().float()
    return QTensor4.from_codes(codes, scale, group_size=16, **fields)


def tensors_of(format: str) -> dict[str, torch.Tensor]:
    zero = torch.randint(1, 16, (16, 4), dtype=torch.uint8)
    order = torch.randperm(64, dtype=torch.int32)
    if format == "gptq":
        return gptq.encode(weight(zero=zero, perm=order))
    if format == "awq":
        return awq.encode(weight(zero=zero))
    if format == "compressed-tensors":
        return compressed_tensors.encode(weight(zero=zero, perm=order))
    if format == "bitsandbytes":
        nested, scale = bitsandbytes.nest(weight(codebook="nf4"))
        return bitsandbytes.encode(nested, nested=scale)
    return weight(zero=zero, perm=order).tensors()


def file_of(format: str) -> bytes:
    tensors = {f"layers.0.q.{name}": t for name, t in tensors_of(format).items()}
    tensors["norm.weight"] = torch.ones(8)
    return save(tensors)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Shorter by some bytes."""
    return content[: rng.randrange(len(content))]


def grown(content: bytes, rng: random.Random) -> bytes:
    """With bytes behind the last tensor."""
    return content + rng.randbytes(rng.randrange(1, 50))


def longer_header(content: bytes, rng: random.Random) -> bytes:
    """A header that is said to be longer than the file."""
    size = rng.choice([len(content), 2**31, 2**40, 2**63, 2**64 - 1])
    return struct.pack("<Q", size) + content[8:]


def other_offsets(content: bytes, rng: random.Random) -> bytes:
    """A tensor's place moved, out of the file or over another's."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    by = rng.choice([1, 8, 2**20, 2**40, -1])
    header[name]["data_offsets"] = [max(begin + by, 0), end + by]
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + content[8 + size :]


DAMAGES = (cut, grown, longer_header, other_offsets)


def without_one(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """A tensor is missing, but one that may be."""
    may = ("g_idx", "weight_g_idx", "weight_zero_point", "zeros", "perm")
    # Without its mark there is no layer at all, which is refused as well.
    del tensors[rng.choice([name for name in tensors if name not in may])]


def of_another_shape(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """A tensor has a dimension more, or fewer rows."""
    name = rng.choice(list(tensors))
    value = tensors[name]
    # Without a last word of places a state or an order is none, and so on for each.
    tensors[name] = rng.choice([value[None], value[: len(value) - 1]]).contiguous()


def of_another_dtype(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """A tensor is of a dtype that the format does not know there."""
    name = rng.choice(list(tensors))
    other = torch.int16 if tensors[name].dtype is not torch.int16 else torch.int8
    tensors[name] = tensors[name].to(other)


def impossible_value(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """A scale that is not finite, an index out of range, or a layout that is none."""
    names = [n for n, t in tensors.items() if t.is_floating_point() and "map" not in n]
    names += [n for n in tensors if n in ("g_idx", "weight_g_idx", "perm", "layout")]
    names += [n for n in tensors if n == "weight_shape"]
    name = rng.choice(names)
    value = tensors[name].clone().flatten()
    at = rng.randrange(len(value))
    if value.is_floating_point():
        value[at] = rng.choice([float("nan"), float("inf"), -float("inf")])
    else:
        value[at] = rng.choice([-2, 10**6, 2**31 - 1])
    tensors[name] = value.view(tensors[name].shape)


CHANGES: tuple[Callable[[dict[str, torch.Tensor], random.Random], None], ...] = (
    without_one,
    of_another_shape,
    of_another_dtype,
    impossible_value,
)


@pytest.mark.parametrize("format", FORMATS)
def test_files_that_cannot_be_right(format: str, tmp_path: Path) -> None:
    rng = random.Random(format)
    path = tmp_path / "model.safetensors"
    good = file_of(format)
    path.write_bytes(good)
    assert len(checkpoint.load_checkpoint(path, format=format).layers) == 1
    for i in range(COUNT):
        if i % 2:
            damage = DAMAGES[i // 2 % len(DAMAGES)]
            path.write_bytes(damage(good, rng))
        else:
            damage = CHANGES[i // 2 % len(CHANGES)]
            tensors = dict(tensors_of(format))
            damage(tensors, rng)
            path.write_bytes(save({f"q.{name}": t for name, t in tensors.items()}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = error_of(lambda: checkpoint.load_checkpoint(path, format=format))
        assert "model.safetensors: " in error, f"{i}: {damage.__name__}"
        assert "expected" in error


def error_of(read: Callable[[], object]) -> str:
    """The ValueError's words; none where there is no error. Any other error is the test's."""
    try:
        read()
    except ValueError as error:
        return str(error)
    return ""


def refused_or_sound(read: Callable[[], dict[str, QTensor4]]) -> int:
    """1 where the file is refused with a ValueError; what is read has passed QTensor4's checks."""
    layers: dict[str, QTensor4] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if error := error_of(lambda: layers.update(read())):
            assert "expected" in error
            return 1
    for layer in layers.values():
        assert layer.dequantize(torch.float32).isfinite().all()
    return 0


@pytest.mark.parametrize("format", FORMATS)
def test_headers_with_changed_bytes(format: str, tmp_path: Path) -> None:
    rng = random.Random(format)
    path = tmp_path / "model.safetensors"
    good = file_of(format)
    (size,) = struct.unpack("<Q", good[:8])
    refused = 0
    for _ in range(COUNT):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(8 + size)] = rng.randrange(256)
        path.write_bytes(content)
        refused += refused_or_sound(
            lambda: {
                n: layer.weight
                for n, layer in checkpoint.load_checkpoint(path, format=format).layers.items()
            }
        )
    assert refused > COUNT // 2


# -- deltas ----------------------------------------------------------------------------------------


def delta_file(path: Path) -> bytes:
    # The last of 345 offsets are no multiple of what low bits can be.
    weights = [torch.randn(15, 23).bfloat16(), *torch.randn(3, 16, 24).bfloat16()]
    weights[3][::2] = 0
    sets = {
        "element": sparsity.select(weights[:1], 0.1)[0],
        "blocks": sparsity.blocks(weights[1], [0, 3], (4, 4)),
        "hashed": sparsity.hashed(weights[2], 20, 3),
        "nonzero": sparsity.nonzero(weights[3]),
    }
    ft.save_delta(sets, path)
    return path.read_bytes()


def opened(content: bytes) -> tuple[dict, dict[str, torch.Tensor]]:
    (size,) = struct.unpack("<Q", content[:8])
    (text,) = json.loads(content[8 : 8 + size])["__metadata__"].values()
    return json.loads(text.partition("\n")[2]), load(content)


def forged(manifest: object, tensors: dict[str, torch.Tensor]) -> bytes:
    """A file that states the right sha256 of whatever it holds."""
    text = json.dumps(manifest)
    stated = f"{_manifest.sha256_of_content(text, tensors)}\n{text}"
    return save(tensors, metadata={"pyfastft.delta": stated})


def other_field(manifest: dict, tensors: dict, rng: random.Random) -> None:
    """A parameter's field is missing, of another type, or says what cannot be."""
    entry = manifest["parameters"][rng.choice(["element", "blocks", "hashed", "nonzero"])]
    key = rng.choice(list(entry))
    wrong = {
        "shape": [[], [16], [16, -24], [2**40, 2**40], [16.0, 24], [True, 24], [3, 5]],
        "dtype": ["int8", "float32", "", 3],
        "layout": [None, 3],
        "rows": [0, -1, 5, 2**70, True],
        "columns": [0, -1, 7, 2**70, 2.0],
        "fingerprint": ["", "0" * 63, "g" * 64, None],
        "index_sha256": ["", "0" * 65, None],
        "index": ["all", "gaps", None, "numbers", "hashed"],
        "low_bits": [-1, 0, 1, 9, 62, 63, 2**70, "2"],
        "recipe": [{}, {"seed": 3}, {"seed": 2**63, "count": 20}, {"seed": 3, "count": 10**12}],
    }[key]
    value = rng.choice([one for one in wrong if one != entry[key]])
    if rng.random() < 0.2:
        del entry[key]
    else:
        entry[key] = value


def other_manifest(manifest: dict, tensors: dict, rng: random.Random) -> None:
    """The manifest as a whole is of another version or kind, or names other parameters."""
    parameters = manifest["parameters"]
    change = rng.choice([
        lambda: manifest.update(version=rng.choice([0, 2, "1", None])),
        lambda: manifest.update(kind=rng.choice(["", "sum", None, []])),
        lambda: manifest.update(parameters=rng.choice([[], None, {}])),
        lambda: manifest.pop(rng.choice(list(manifest))),
        lambda: manifest.update(more=1),
        lambda: parameters.pop(rng.choice(list(parameters))),
        lambda: parameters.update({"x": parameters["element"]}),
        lambda: parameters.update({"element": rng.choice([[], None, "x", 1])}),
    ])  # fmt: skip
    change()


def other_values(manifest: dict, tensors: dict, rng: random.Random) -> None:
    """Values that are not finite, of another number, shape or dtype, or missing."""
    key = rng.choice([name for name in tensors if name.endswith("::values")])
    value = tensors[key].clone()
    value[rng.randrange(len(value))] = rng.choice([float("nan"), float("inf")])
    # How many entries are not zero, only their weight tells: apply does.
    fewer = tensors[key][:-1] if "nonzero" not in key else value
    tensors[key] = rng.choice([value, fewer, tensors[key][None], tensors[key].float()])
    if rng.random() < 0.2:
        del tensors[key]


def other_index(manifest: dict, tensors: dict, rng: random.Random) -> None:
    """An index that is cut, of another dtype, or of numbers that repeat, fall or lie outside."""
    key = rng.choice([name for name in tensors if name.endswith("::index")])
    name = key.removesuffix("::index")
    stream, entry = tensors[key].clone(), manifest["parameters"][name]
    area = entry["rows"] * entry["columns"]
    count = len(tensors[f"{name}::values"]) // area
    end = entry["shape"][0] * entry["shape"][1] // area
    bits = entry["low_bits"]
    string = bits * -(-count // 8)
    if rng.random() < 0.5:
        # Of ones alone there are more numbers, of zeros alone none.
        stream[string:] = rng.choice([0, 255])
    else:
        # In the same bytes the same number again, or a last one beyond the end, where low bits go.
        beyond = [*range(count - 1), (end - 1 >> bits << bits) + 2**bits - 1]
        numbers = torch.tensor(beyond if beyond[-1] >= end else [end - 1] * count)
        ones = torch.zeros(8 * (len(stream) - string), dtype=torch.uint8)
        ones[(numbers >> bits) + torch.arange(count)] = 1
        planes = [delta._pack_bits((numbers >> bit & 1).byte()) for bit in range(bits)]
        stream = torch.cat([*planes, delta._pack_bits(ones)])
    at = rng.randrange(len(stream))
    tensors[key] = rng.choice([stream, stream, stream[:at], stream.short(), stream[None]])
    if rng.random() < 0.1:
        del tensors[key]


DELTA_CHANGES = (other_field, other_manifest, other_values, other_index)


def test_deltas_that_cannot_be_right(tmp_path: Path) -> None:
    rng = random.Random(2)
    path = tmp_path / "task.delta"
    good = delta_file(path)
    assert list(ft.load_delta(path).changes) == ["element", "blocks", "hashed", "nonzero"]
    path.write_bytes(forged(*opened(good)))
    assert len(ft.load_delta(path).changes) == 4
    for i in range(COUNT):
        if i % 5 == 0:
            damage = DAMAGES[i // 5 % len(DAMAGES)]
            path.write_bytes(damage(good, rng))
        else:
            damage = DELTA_CHANGES[i % 5 - 1]
            manifest, tensors = opened(good)
            damage(manifest, tensors, rng)
            path.write_bytes(forged(manifest, {k: t.contiguous() for k, t in tensors.items()}))
        error = error_of(lambda: ft.load_delta(path))
        assert "task.delta: " in error, f"{i}: {damage.__name__}"
        assert "expected" in error
    manifest, tensors = opened(good)
    manifest["parameters"]["hashed"]["shape"] = [2**40, 2**40]
    path.write_bytes(forged(manifest, tensors))
    assert "hashed: expected fewer than 2^63 elements" in error_of(lambda: ft.load_delta(path))
    manifest, tensors = opened(good)
    manifest["parameters"]["blocks"]["index"] = "all"
    del manifest["parameters"]["blocks"]["low_bits"], tensors["blocks::index"]
    path.write_bytes(forged(manifest, tensors))
    assert "blocks: expected values of 24 rectangles" in error_of(lambda: ft.load_delta(path))


def test_deltas_with_changed_bytes(tmp_path: Path) -> None:
    """A delta states its sha256, so that a byte anywhere is seen."""
    rng = random.Random(3)
    path = tmp_path / "task.delta"
    good = delta_file(path)
    for _ in range(COUNT):
        at = rng.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        assert "task.delta: expected" in error_of(lambda: ft.load_delta(path)), str(at)
    for text in ("", "\n", "\n{}"):
        path.write_bytes(save({}, metadata={"pyfastft.delta": text}))
        assert "task.delta: expected" in error_of(lambda: ft.load_delta(path))
    for text in ("[]", "[" * 100_000, "{", "{}"):
        stated = f"{_manifest.sha256_of_content(text, {})}\n{text}"
        path.write_bytes(save({}, metadata={"pyfastft.delta": stated}))
        assert "task.delta: " in error_of(lambda: ft.load_delta(path))
    path.write_bytes(save({"x": torch.ones(2)}))
    assert "expected a delta" in error_of(lambda: ft.load_delta(path))
    with pytest.raises(FileNotFoundError, match="no such file"):
        ft.load_delta(tmp_path / "nothing")


def gguf_file() -> bytes:
    raw = gguf.encode_q4_0(
        QTensor4.from_codes(
            torch.randint(16, (8, 64), dtype=torch.uint8),
            (torch.rand(8, 2) + 0.5).half().float(),
            group_size=32,
        )
    )
    name, key = b"blk.0.weight", b"general.architecture"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    head += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 4) + b"test"
    head += struct.pack("<Q", 4) + b"list" + struct.pack("<IIQ3I", 9, 4, 3, 1, 2, 3)
    head += struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 64, 8, 2, 0)
    return head + bytes(-len(head) % 32) + bytes(raw.tolist())


def test_gguf_files_that_cannot_be_right(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "m.gguf"
    good = gguf_file()
    path.write_bytes(good)
    assert list(gguf.load(path)) == ["blk.0.weight"]
    header = good.index(b"blk.0.weight") + len(b"blk.0.weight")
    for i in range(COUNT):
        content = bytearray(good)
        if i % 4 == 0:
            content = content[: rng.randrange(len(content))]
        elif i % 4 == 1:
            content[rng.randrange(8)] ^= 1 << rng.randrange(3, 8)  # magic number and version
        elif i % 4 == 2:
            at = rng.choice([8, 16, 24, header + 4, header + 12])  # counts and sizes
            content[at + rng.randrange(4, 8)] = rng.randrange(1, 256)
        else:
            at = len(good) - rng.randrange(1, 17) * 18  # a scale
            content[at : at + 2] = struct.pack("<H", rng.choice([0x7C00, 0xFC00, 0x7E00]))
        path.write_bytes(content)
        error = error_of(lambda: gguf.load(path))
        assert "m.gguf: " in error, str(i)
        assert "expected" in error


def test_gguf_headers_with_changed_bytes(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / "m.gguf"
    good = gguf_file()
    header = len(good) - 16 * 18
    refused = 0
    for _ in range(COUNT):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(content)
        refused += refused_or_sound(lambda: gguf.load(path))
    assert refused > COUNT // 4


def test_folders_that_reach_outside(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "other.safetensors").write_bytes(file_of("gptq"))
    for shard in ("../other.safetensors", str(tmp_path / "other.safetensors"), "..", "", 3):
        index = {"weight_map": {"layers.0.q.qweight": shard}}
        (inside / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"index\.json: expected files of this folder"):
            checkpoint.load_checkpoint(inside)
    for text in ("[]", "{", '{"weight_map": 3}', "[" * 100_000):
        (inside / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: "):
            checkpoint.load_checkpoint(inside)
    (inside / "model.safetensors.index.json").unlink()
    for text in ("[]", "{", '{"group_size": "x"}', '{"quant_method": 3}', '{"quant_method": "x"}'):
        (inside / "quantize_config.json").write_text(text)
        (inside / "model.safetensors").write_bytes(file_of("gptq"))
        with pytest.raises(ValueError, match=r"expected|Expecting"):
            checkpoint.load_checkpoint(inside)
    with pytest.raises(FileNotFoundError, match="no such file"):
        checkpoint.load_checkpoint(tmp_path / "nothing.safetensors")
