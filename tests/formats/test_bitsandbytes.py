"""bitsandbytes' nf4 and fp4: against a packer written element by element from the documented
layout, against bitsandbytes itself where it is installed, and back to the same bits."""

from __future__ import annotations

import json

import pytest
import torch

from pyfastft._codebook import TABLES
from pyfastft.config import PTQ4
from pyfastft.formats import bitsandbytes as ours
from pyfastft.quantization import QTensor4, quantize_weight
from pyfastft.testing.tolerance import assert_exact

STATE = "weight.quant_state.bitsandbytes__"


def drawn(
    n: int, k: int, blocksize: int, kind: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A layer's tensors, written flat and byte by byte, and W."""
    codes = torch.randint(16, (n * k,), dtype=torch.uint8)
    absmax = torch.rand(-(-n * k // blocksize)) + 0.5
    data = torch.zeros(-(-n * k // 2), 1, dtype=torch.uint8)
    for i, code in enumerate(codes.tolist()):
        data[i // 2, 0] |= code << (4 if i % 2 == 0 else 0)
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16", "shape": [n, k]}
    tensors = {
        "weight": data,
        "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(TABLES[kind]),
        STATE + kind: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    values = tensors["weight.quant_map"][codes.int()]
    w = values * absmax.repeat_interleave(blocksize)[: n * k]
    return tensors, w.view(n, k)


def assert_same(written: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert written.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_exact(written[name], tensor, name)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("n", "k", "blocksize"), [(6, 128, 64), (5, 64, 64), (3, 7, 7), (8, 16, 64), (5, 16, 64)]
)
def test_bitsandbytes(n: int, k: int, blocksize: int, kind: str) -> None:
    tensors, w = drawn(n, k, blocksize, kind)
    layer = ours.decode(tensors)
    assert_exact(layer.weight.dequantize(), w, "W")
    assert_same(ours.encode(layer.weight, **layer.options), tensors)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_storages(storage: torch.dtype) -> None:
    tensors, w = drawn(4, 64, 64, "nf4")
    tensors["weight"] = tensors["weight"].flatten().view(storage).view(-1, 1)
    layer = ours.decode(tensors)
    assert_exact(layer.weight.dequantize(), w, "W")
    written = ours.encode(layer.weight, **layer.options)
    assert written["weight"].dtype is storage
    assert_exact(written["weight"].view(torch.uint8), tensors["weight"].view(torch.uint8), "bytes")


def test_nested_scales() -> None:
    tensors, _ = drawn(40, 640, 64, "nf4")
    plain = ours.decode(tensors).weight
    weight, nested = ours.nest(plain)
    assert nested.absmax.shape == (2,)
    assert_exact(weight.codes, plain.codes, "codes")
    step = (plain.scale - weight.scale).abs().max() / (plain.scale - nested.offset).abs().max()
    assert 0 < step < 1 / 64, "the map's largest step is a 64th of its range"
    written = ours.encode(weight, dtype=torch.float16, nested=nested)
    assert written["weight.absmax"].dtype is torch.uint8
    again = ours.decode(written)
    assert again.weight.equal(weight)
    assert_same(ours.encode(again.weight, **again.options), written)
    with pytest.raises(ValueError, match="nested scales that are the weight's"):
        ours.encode(plain, nested=nested)


@pytest.mark.parametrize(("n", "k", "blocksize"), [(4, 48, 64), (4, 100, 64), (3, 16, 40)])
def test_blocks_across_rows_are_refused(n: int, k: int, blocksize: int) -> None:
    with pytest.raises(ValueError, match="expected rows of whole blocks or blocks of whole rows"):
        ours.decode(drawn(n, k, blocksize, "nf4")[0])


def test_what_cannot_be_written() -> None:
    codes = torch.zeros(4, 12, dtype=torch.uint8)
    with pytest.raises(ValueError, match="got int4"):
        ours.encode(QTensor4.from_codes(codes, torch.ones(4, 1), group_size=12))
    nf4 = {"group_size": 8, "codebook": "nf4"}
    with pytest.raises(ValueError, match="rows of whole blocks of 8"):
        ours.encode(QTensor4.from_codes(codes, torch.ones(4, 2), **nf4))
    with pytest.raises(ValueError, match="scales of float32"):
        ours.encode(QTensor4.from_codes(codes, torch.ones(4, 2).bfloat16(), **nf4))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_against_bitsandbytes_itself(kind: str, double: bool) -> None:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="the peer is not installed", exc_type=ImportError
    )
    w = torch.randn(48, 256)
    data, state = functional.quantize_4bit(w, quant_type=kind, compress_statistics=double)
    theirs = {"weight": data}
    theirs |= {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    layer = ours.decode(theirs)
    assert_exact(layer.weight.dequantize(), functional.dequantize_4bit(data, state), "W")
    assert_same(ours.encode(layer.weight, **layer.options), theirs)
    assert ours.decode(theirs).options.keys() >= ({"nested"} if double else set())
    # And what we make of a weight of our own is read by it.
    if double:
        plain = functional.quantize_4bit(w, quant_type=kind)
        weight = ours.decode(
            {"weight": plain[0]}
            | {f"weight.{n}": v for n, v in plain[1].as_dict(packed=True).items()}
        ).weight
        nested_weight, nested = ours.nest(weight)
        written = ours.encode(nested_weight, nested=nested)
        read = functional.QuantState.from_dict(
            {n.removeprefix("weight."): t for n, t in written.items() if n != "weight"},
            device=torch.device("cpu"),
        )
        assert_exact(
            functional.dequantize_4bit(written["weight"], read), nested_weight.dequantize(), "W"
        )
        assert_exact(nested.quant_map, state.state2.code, "the dynamic map")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_our_quantizer_gives_bitsandbytes_codes(kind: str) -> None:
    """Without a clip search; fp4's code 8 is another 0, which ours leaves out."""
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="the peer is not installed", exc_type=ImportError
    )
    w = torch.randn(64, 256)
    data, state = functional.quantize_4bit(w, quant_type=kind, compress_statistics=False)
    theirs = {"weight": data}
    theirs |= {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    found = ours.decode(theirs).weight
    weight = quantize_weight(w, PTQ4(codebook=kind, grid=1))
    assert_exact(weight.scale, found.scale, "scale")
    codes = found.unpack()
    assert_exact(weight.unpack(), codes.where((codes != 8) | (kind == "nf4"), 0), "codes")
