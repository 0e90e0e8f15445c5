"""4-bit weights for the samples, and what every op of the family refuses of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pyfastft.testing.samples._base import Drawer, Precision, Reject


@dataclass(frozen=True)
class Int4Shape:
    """One 4-bit layer's sizes, and what is special about its operands."""

    name: str
    leading: tuple[int, ...]
    n: int
    k: int
    group: int
    zero: str | None = None  # "uint8" or "float"
    codebook: str = "int4"
    half_scale: bool = False
    perm: bool = False
    bias: bool = True
    layout: str = "contiguous"  # of x
    large: bool = False


SHAPES = (
    Int4Shape("odd", (2, 3), 5, 7, 4, zero="float"),
    Int4Shape("vector", (), 5, 16, 8, zero="uint8"),
    Int4Shape("one-row", (1,), 19, 24, 8, bias=False),
    Int4Shape("one-column", (6,), 1, 1, 1),
    Int4Shape("per-channel", (4,), 9, 22, 64, zero="uint8"),
    Int4Shape("leading-dims", (2, 2, 3), 17, 32, 16, zero="float", half_scale=True, bias=False),
    Int4Shape("nf4", (7,), 12, 32, 16, codebook="nf4"),
    Int4Shape("fp4", (3,), 11, 19, 8, codebook="fp4", half_scale=True),
    Int4Shape("perm", (6,), 8, 16, 8, zero="uint8", perm=True),
    Int4Shape("perm-odd", (3,), 6, 13, 5, zero="float", perm=True),
    Int4Shape("permuted-dense", (6, 5), 12, 16, 8, layout="permuted"),
    Int4Shape("slice", (9,), 18, 23, 8, zero="uint8", layout="slice"),
    Int4Shape("expanded", (8,), 16, 16, 8, layout="expanded"),
    Int4Shape("sliced-codes", (5,), 6, 16, 8, zero="float", layout="codes"),
    Int4Shape("no-rows", (0,), 5, 8, 4),
    Int4Shape("no-columns", (3,), 0, 8, 4, zero="uint8"),
    Int4Shape("no-inputs", (3,), 5, 0, 4),
    Int4Shape("off-tile", (3, 37), 131, 101, 16, zero="uint8", large=True),
    Int4Shape("ragged", (33,), 70, 300, 128, zero="float", large=True),
    Int4Shape("several-tiles", (150,), 200, 320, 64, half_scale=True, large=True),
    Int4Shape("deep", (3,), 40, 1000, 32, codebook="nf4", large=True),
    Int4Shape("deep-one-row", (1,), 90, 1100, 128, zero="float", large=True),
    Int4Shape("one-group", (20,), 70, 900, 1024, large=True),
    Int4Shape("perm-tiles", (40,), 75, 160, 32, zero="uint8", perm=True, large=True),
)

Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def weight(shape: Int4Shape, precision: Precision, device: torch.device) -> Weight:
    """codes, scale, zero and perm."""
    draw = Drawer(f"weight {shape.name}", precision, device)
    n, k, groups = shape.n, shape.k, -(-shape.k // shape.group)
    codes = torch.randint(256, (n, -(-k // 2)), generator=draw.generator, dtype=torch.uint8)
    if shape.layout == "codes":
        codes = codes.repeat_interleave(2, dim=1)[:, ::2]
    if k % 2:
        codes[:, -1] &= 15
    scale = draw.wide(n, groups, scale=0.25 * max(k, 1) ** -0.5)
    half = shape.half_scale and precision.base is not torch.float64
    scale = scale.bfloat16() if half else scale
    zero = None
    if shape.zero == "uint8":
        zero = torch.randint(16, (n, groups), generator=draw.generator, dtype=torch.uint8)
        zero = zero.to(device)
    elif shape.zero == "float":
        zero = (7.5 + 2 * draw.wide(n, groups)).to(scale.dtype)
    perm = None
    if shape.perm:
        perm = torch.randperm(k, generator=draw.generator).int().to(device)
    return codes.to(device), scale, zero, perm


def activation(shape: Int4Shape, precision: Precision, device: torch.device) -> torch.Tensor:
    """x, in the shape's layout."""
    draw = Drawer(shape.name, precision, device)
    k = shape.k
    if shape.layout == "permuted":
        return draw.base(*shape.leading[::-1], k).transpose(0, 1)
    if shape.layout == "slice":
        return draw.base(*shape.leading, 2 * k + 3)[..., 3::2]
    if shape.layout == "expanded":
        return draw.base(1, k).expand(*shape.leading, k)
    return draw.base(*shape.leading, k)


def weight_rejects(
    reject: Callable[..., Reject], weight: Weight, *, codebooks: bool = True
) -> Iterator[Reject]:
    """What every op of the family refuses of a weight of N = 5, K = 7, g = 4."""
    codes, scale, zero, _ = weight
    assert zero is not None
    yield reject("codes-1d", "codes", codes[0], ValueError, "shape (N, ceil(K / 2))", "(4,)")
    yield reject("codes-short", "codes", codes[:, :3], ValueError, "shape (N, 4)", "(5, 3)")
    yield reject("codes-dtype", "codes", codes.int(), TypeError, "dtype uint8", "int32")
    yield reject("codes-list", "codes", [1], TypeError, "type Tensor", "list")
    yield reject("codes-sparse", "codes", codes.to_sparse(), TypeError, "a dense", "sparse_coo")
    yield reject("scale-groups", "scale", scale[:, :1], ValueError, "shape (5, 2)", "(5, 1)")
    yield reject("scale-dtype", "scale", scale.half(), TypeError, "dtype float32", "float16")
    yield reject("scale-device", "scale", scale.to("meta"), ValueError, "device cpu", "meta")
    yield reject("zero-groups", "zero", zero[:4], ValueError, "shape (5, 2)", "(4, 2)")
    yield reject("zero-dtype", "zero", zero.int(), TypeError, "dtype uint8 or float32", "int32")
    perm = torch.arange(7)
    yield reject("perm-dtype", "perm", perm, TypeError, "dtype int32", "int64")
    yield reject("perm-short", "perm", perm[:6].int(), ValueError, "shape (7,)", "(6,)")
    yield reject("group-size-0", "group_size", 0, ValueError, "at least 1", "0")
    if not codebooks:
        return
    yield reject("codebook", "codebook", "int3", ValueError, "int4 or nf4 or fp4", "'int3'")
    yield reject("zero-of-nf4", "codebook", "nf4", ValueError, "None", "a tensor", at="zero")
