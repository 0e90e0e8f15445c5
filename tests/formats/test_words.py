"""GPTQ, AWQ and compressed-tensors: against packers written element by element from the documented
layouts, against compressed-tensors itself, and back to the same bits."""

from __future__ import annotations

import warnings

import pytest
import torch

from pyfastft.formats import awq, compressed_tensors, gptq
from pyfastft.quantization import QTensor4
from pyfastft.testing.tolerance import assert_exact

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def drawn(n: int, k: int, groups: int, *, zeros: str = "any", dtype=torch.float16):
    codes = torch.randint(16, (n, k), dtype=torch.uint8)
    zero = torch.randint(16, (n, groups), dtype=torch.uint8)
    if zeros == "none":
        zero.fill_(8)
    elif zeros == "positive":
        zero.clamp_(min=1)
    scale = (torch.rand(n, groups) + 0.5).to(dtype)
    return codes, zero, scale


def gptq_tensors(codes, zero, scale, g_idx, stored_less: int) -> dict[str, torch.Tensor]:
    """Word by word, as the format's description says."""
    n, k = codes.shape
    groups = zero.shape[1]
    qweight = torch.zeros(k // 8, n, dtype=torch.int32)
    for r in range(k // 8):
        for column in range(n):
            word = sum(int(codes[column, 8 * r + i]) << 4 * i for i in range(8))
            qweight[r, column] = signed(word)
    qzeros = torch.zeros(groups, n // 8, dtype=torch.int32)
    for g in range(groups):
        for j in range(n // 8):
            word = sum(((int(zero[8 * j + i, g]) - stored_less) & 15) << 4 * i for i in range(8))
            qzeros[g, j] = signed(word)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scale.T.contiguous(), "g_idx": g_idx}


def dequantized(codes, zero, scale, g_idx) -> torch.Tensor:
    group = g_idx.long()
    return scale.float()[:, group] * (codes.float() - zero.float()[:, group])


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_exact(ours[name], tensor, name)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zeros", ["none", "positive"])
@pytest.mark.parametrize(("checkpoint_format", "less"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize(("n", "k", "size"), [(16, 64, 16), (8, 40, 16), (24, 32, 32)])
def test_gptq(n, k, size, checkpoint_format, less, zeros, act_order) -> None:
    groups = -(-k // size)
    codes, zero, scale = drawn(n, k, groups, zeros=zeros)
    g_idx = (torch.arange(k) // size).to(torch.int32)
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    tensors = gptq_tensors(codes, zero, scale, g_idx, less)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = gptq.decode(tensors, checkpoint_format=checkpoint_format)
        written = gptq.encode(layer.weight, **layer.options)
    weight = layer.weight
    assert (weight.perm is not None) == (act_order and groups > 1)
    assert (weight.zero is None) == (zeros == "none")
    assert weight.group_size == size
    assert_exact(weight.dequantize(), dequantized(codes, zero, scale, g_idx), "W")
    assert_same(written, tensors)


def test_gptq_zero_points_of_zero_are_told_of() -> None:
    codes, zero, scale = drawn(16, 32, 2, zeros="positive")
    zero[7, 0] = 0
    g_idx = (torch.arange(32) // 16).to(torch.int32)
    tensors = gptq_tensors(codes, zero, scale, g_idx, 1)
    with pytest.warns(UserWarning, match=r"1 words of qzeros end in 15: zero-points of 0"):
        layer = gptq.decode(tensors)
    assert_exact(layer.weight.dequantize(), dequantized(codes, zero, scale, g_idx), "W")
    with pytest.warns(UserWarning, match="readers of checkpoint_format 'gptq' disagree"):
        assert_same(gptq.encode(layer.weight, **layer.options), tensors)

    # The usual writer does not mask what it shifts: -1 sets all higher bits.
    word = 0
    for i in range(8):
        word |= (int(zero[i, 0]) - 1 if i != 2 else -1) << 4 * i
    damaged = tensors["qzeros"].clone()
    damaged[0, 0] = signed(word & 0xFFFFFFFF)
    with pytest.warns(UserWarning, match="may have overwritten their neighbours"):
        gptq.decode({**tensors, "qzeros": damaged})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gptq.decode(gptq_tensors(codes, zero, scale, g_idx, 0), checkpoint_format="gptq_v2")


@pytest.mark.parametrize(("named", "less"), [("gptq", 0), ("gptq_v2", 1)])
def test_gptq_of_the_other_format_is_told_of(named: str, less: int) -> None:
    codes, zero, scale = drawn(8, 16, 1, zeros="none")
    tensors = gptq_tensors(codes, zero, scale, torch.zeros(16, dtype=torch.int32), less)
    with pytest.warns(UserWarning, match="it may be mislabelled"):
        gptq.decode(tensors, checkpoint_format=named)


def test_gptq_without_g_idx() -> None:
    codes, zero, scale = drawn(8, 40, 3, zeros="positive")
    g_idx = (torch.arange(40) // 16).to(torch.int32)
    tensors = gptq_tensors(codes, zero, scale, g_idx, 1)
    del tensors["g_idx"]
    with pytest.raises(ValueError, match="expected a group size, 40 inputs are not 3 equal"):
        gptq.decode(tensors)
    layer = gptq.decode(tensors, group_size=16)
    assert_exact(layer.weight.dequantize(), dequantized(codes, zero, scale, g_idx), "W")
    assert_same(gptq.encode(layer.weight, **layer.options), tensors)


@pytest.mark.parametrize(("n", "k", "size"), [(16, 48, 16), (8, 32, -1), (32, 7, 7)])
def test_awq(n: int, k: int, size: int) -> None:
    size = k if size < 0 else size
    groups = k // size
    codes, zero, scale = drawn(n, k, groups)

    def words(values: torch.Tensor) -> torch.Tensor:  # (R, N)
        out = torch.zeros(values.shape[0], n // 8, dtype=torch.int32)
        for r in range(values.shape[0]):
            for j in range(n // 8):
                word = sum(int(values[r, 8 * j + AWQ_ORDER[i]]) << 4 * i for i in range(8))
                out[r, j] = signed(word)
        return out

    tensors = {
        "qweight": words(codes.T),
        "qzeros": words(zero.T),
        "scales": scale.T.contiguous(),
    }
    layer = awq.decode(tensors, group_size=size)
    g_idx = torch.arange(k) // size
    assert_exact(layer.weight.dequantize(), dequantized(codes, zero, scale, g_idx), "W")
    assert_same(awq.encode(layer.weight, **layer.options), tensors)


@pytest.mark.parametrize("act_order", [False, True, "unused"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k", "size"), [(16, 64, 16), (5, 43, 43), (9, 24, 8)])
def test_compressed_tensors(n, k, size, dtype, symmetric, act_order) -> None:
    groups = -(-k // size)
    codes, zero, scale = drawn(n, k, groups, dtype=dtype, zeros="none" if symmetric else "any")
    packed = torch.zeros(n, -(-k // 8), dtype=torch.int32)
    for row in range(n):
        for r in range(packed.shape[1]):
            part = codes[row, 8 * r : 8 * r + 8].tolist()
            packed[row, r] = signed(sum(code << 4 * i for i, code in enumerate(part)))
    points = torch.zeros(-(-n // 8), groups, dtype=torch.int32)
    for r in range(points.shape[0]):
        for g in range(groups):
            part = zero[8 * r : 8 * r + 8, g].tolist()
            points[r, g] = signed(sum(z << 4 * i for i, z in enumerate(part)))
    g_idx = (torch.arange(k) // size).to(torch.int32)
    tensors = {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = points
    if act_order:
        g_idx = g_idx if act_order == "unused" else g_idx[torch.randperm(k)]
        unused = torch.full_like(g_idx, -1)
        tensors["weight_g_idx"] = unused if act_order == "unused" else g_idx
    layer = compressed_tensors.decode(tensors)
    assert layer.weight.scale.dtype is (
        torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    )
    truth = dequantized(codes, zero, scale, g_idx)
    assert_exact(layer.weight.dequantize(torch.float32), truth, "W")
    assert_same(compressed_tensors.encode(layer.weight, **layer.options), tensors)


def test_against_compressed_tensors_own_packer() -> None:
    pytest.importorskip("compressed_tensors", reason="the peer is not installed")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes, zero, scale = drawn(11, 45, 3)
    ours = QTensor4.from_codes(codes, scale.float(), zero=zero, group_size=15)
    written = compressed_tensors.encode(ours, scale_dtype=torch.float16)
    theirs = pack_to_int32(codes.to(torch.int8) - 8, 4)
    assert_exact(written["weight_packed"], theirs, "weight_packed")
    theirs = pack_to_int32(zero.to(torch.int8) - 8, 4, packed_dim=0)
    assert_exact(written["weight_zero_point"], theirs, "weight_zero_point")


REJECTED_WEIGHTS = {
    "nf4": ({"codebook": "nf4"}, "codebook 'int4'"),
    "float-zero": ({"zero": torch.full((8, 2), 7.5)}, "integers"),
    "scale": ({"scale": torch.full((8, 2), 0.1)}, "float16 holds exactly"),
}


@pytest.mark.parametrize("name", REJECTED_WEIGHTS)
@pytest.mark.parametrize("module", [gptq, awq, compressed_tensors], ids=lambda m: m.__name__[17:])
def test_what_cannot_be_written(module, name: str) -> None:
    fields, message = REJECTED_WEIGHTS[name]
    codes = torch.randint(16, (8, 16), dtype=torch.uint8)
    fields = {"scale": torch.ones(8, 2), "group_size": 8, **fields}
    weight = QTensor4.from_codes(codes, fields.pop("scale"), **fields)
    with pytest.raises(ValueError, match=message):
        module.encode(weight, scale_dtype=torch.float16)


def test_shapes_that_cannot_be_written() -> None:
    def weight(n: int, k: int, **fields) -> QTensor4:
        codes = torch.zeros(n, k, dtype=torch.uint8)
        return QTensor4.from_codes(codes, torch.ones(n, -(-k // 8)), group_size=8, **fields)

    order = torch.arange(16, dtype=torch.int32).flip(0)
    with pytest.raises(ValueError, match="multiples of 8 for GPTQ"):
        gptq.encode(weight(8, 12))
    with pytest.raises(ValueError, match="with_g_idx=True"):
        gptq.encode(weight(8, 16, perm=order), with_g_idx=False)
    with pytest.raises(ValueError, match="N of a multiple of 8"):
        awq.encode(weight(7, 16))
    with pytest.raises(ValueError, match="no order of the inputs for AWQ"):
        awq.encode(weight(8, 16, perm=order))
    with pytest.raises(ValueError, match="groups of one size"):
        awq.encode(weight(8, 12))
    with pytest.raises(ValueError, match="with_g_idx=True"):
        compressed_tensors.encode(weight(8, 16, perm=order), with_g_idx=False)
