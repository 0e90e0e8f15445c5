r"""bitsandbytes' 4-bit checkpoints, nf4 and fp4, as ``Linear4bit`` writes them.

Of a weight (N, K), flat and cut into blocks of B weights:

- ``weight`` uint8 (ceil(N K / 2), 1), or the same bytes in another dtype: two codes in a byte, the
  first in the *high* half;
- ``weight.absmax`` float32 (blocks): the scales; ``weight.quant_map`` float32 (16): the codebook;
- ``weight.quant_state.bitsandbytes__nf4``, or ``__fp4``: bytes of JSON with the block size, the
  shape and the dtype of the weight;
- where scales are quantized too, ``weight.absmax`` is uint8, and ``weight.nested_absmax``,
  ``weight.nested_quant_map`` float32 (256) and the JSON's ``nested_offset`` and
  ``nested_blocksize`` give

.. math:: \mathrm{absmax}_i = \mathrm{map}[q_i] \cdot \mathrm{nested}_{\lfloor i / 256 \rfloor}
    + \mathrm{offset}

Blocks must not cross rows unless each holds whole ones, in which case its scale stands in each.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch

from pyfastft._check import FLOATS, name_of
from pyfastft._codebook import TABLES
from pyfastft.formats._words import Layer, expect, take
from pyfastft.quantization.tensor import QTensor4, unpack_codes

__all__ = ["TENSORS", "NestedScale", "decode", "encode", "nest"]

_STATE = "weight.quant_state.bitsandbytes__"
TENSORS = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    *(f"{_STATE}{kind}" for kind in TABLES if kind != "int4"),
    "weight.nested_absmax",
    "weight.nested_quant_map",
)
_DTYPES = {name_of(dtype): dtype for dtype in FLOATS}
_STORAGES = (torch.uint8, *FLOATS)
_MOST = 2**40  # weights of one layer, so that no product of a hostile shape overflows


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NestedScale:
    """Scales in 8 bits: ``quant_map[codes] * absmax`` per block of ``blocksize``, plus ``offset``.

    Attributes:
        codes: uint8 (blocks).
        absmax: float32 (ceil(blocks / blocksize)).
        quant_map: float32 (256).
        offset: a float32 number.
        blocksize: how many scales share one of theirs.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    quant_map: torch.Tensor
    offset: float
    blocksize: int = 256

    def values(self) -> torch.Tensor:
        """The scales, float32 (blocks), as bitsandbytes computes them."""
        wide = self.absmax.repeat_interleave(self.blocksize)[: len(self.codes)]
        return self.quant_map[self.codes.int()] * wide + self.offset


def decode(tensors: Mapping[str, torch.Tensor]) -> Layer:
    """The weight of one layer's tensors.

    Args:
        tensors: by the names of :data:`TENSORS`; one of the two states, the nested ones where
            scales are quantized.

    Raises:
        ValueError: a tensor is missing or does not fit, the JSON is damaged or lacks something, the
            codebook is another one, or blocks cross rows.
    """
    (kind,) = [k for k in ("nf4", "fp4") if f"{_STATE}{k}" in tensors] or ["nf4"]
    data, absmax, quant_map, raw, nested_absmax, nested_map = take(
        tensors, (*TENSORS[:3], f"{_STATE}{kind}"), TENSORS[-2:]
    )
    state = _read_state(expect("the quantization state", raw, (None,), (torch.uint8,)), kind)
    n, k = state["shape"]
    blocksize = state["blocksize"]
    blocks = -(-n * k // blocksize)
    table = torch.tensor(TABLES[kind])
    quant_map = expect("weight.quant_map", quant_map, (16,), (torch.float32,))
    if not torch.equal(quant_map, table):
        raise ValueError(f"expected weight.quant_map of {kind}'s values, got others")

    assert data is not None
    storage = data.dtype
    if storage not in _STORAGES:
        raise ValueError(f"expected weight of dtype uint8 or a float, got {name_of(storage)}")
    if data.dim() != 2 or 1 not in data.shape:
        raise ValueError(f"expected weight of shape (any, 1), got {tuple(data.shape)}")
    if data.numel() * data.element_size() != -(-n * k // 2):
        raise ValueError(
            f"expected weight of {-(-n * k // 2)} bytes for shape ({n}, {k}), "
            f"got {data.numel() * data.element_size()}"
        )
    flat = data.contiguous().flatten().view(torch.uint8)
    swapped = flat >> 4 | flat << 4
    codes = unpack_codes(swapped[None], n * k).view(n, k)

    options: dict[str, Any] = {
        "dtype": state["dtype"],
        "blocksize": blocksize,
        "storage": storage,
        "shape": tuple(data.shape),
    }
    nested = None
    if "nested_blocksize" in state:
        size = state["nested_blocksize"]
        nested = NestedScale(
            codes=expect("weight.absmax", absmax, (blocks,), (torch.uint8,)),
            absmax=expect(
                "weight.nested_absmax",
                _present("weight.nested_absmax", nested_absmax),
                (-(-blocks // size),),
                (torch.float32,),
            ),
            quant_map=expect(
                "weight.nested_quant_map",
                _present("weight.nested_quant_map", nested_map),
                (256,),
                (torch.float32,),
            ),
            offset=state["nested_offset"],
            blocksize=size,
        )
        absmax = nested.values()
        options["nested"] = nested
    elif nested_absmax is not None or nested_map is not None:
        raise ValueError("expected no nested tensors beside a state without nested_blocksize")
    absmax = expect("weight.absmax", absmax, (blocks,), (torch.float32,))
    scale, group_size = _by_rows(absmax, n, k, blocksize)
    return Layer(
        QTensor4.from_codes(codes, scale, group_size=group_size, codebook=kind),
        options,
    )


def encode(
    weight: QTensor4,
    *,
    dtype: torch.dtype = torch.float32,
    blocksize: int | None = None,
    nested: NestedScale | None = None,
    storage: torch.dtype = torch.uint8,
    shape: tuple[int, ...] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a weight, by the names of :data:`TENSORS`: the inverse of :func:`decode`.

    Args:
        dtype: the weight's before it was quantized, which bitsandbytes computes in.
        blocksize: how many weights share a scale; the weight's group size where absent.
        nested: the scales in 8 bits, as :func:`decode` or :func:`nest` gave them.
        storage: the dtype that the bytes are stored as.
        shape: of the tensor ``weight``; (bytes, 1) where absent.

    Raises:
        ValueError: the format cannot hold the weight as it is: int4, an order of the inputs, a
            shorter last group, scales that are not float32 or that ``nested`` does not give.
    """
    if weight.codebook == "int4":
        raise ValueError("expected a weight of codebook 'nf4' or 'fp4' for bitsandbytes, got int4")
    if weight.perm is not None:
        raise ValueError("expected no order of the inputs for bitsandbytes")
    n, k = weight.shape
    blocksize = weight.group_size if blocksize is None else blocksize
    absmax = _by_blocks(weight, blocksize)
    state: dict[str, Any] = {
        "quant_type": weight.codebook,
        "blocksize": blocksize,
        "dtype": name_of(dtype),
        "shape": [n, k],
    }
    tensors = {"weight.absmax": absmax}
    if nested is not None:
        if not torch.equal(nested.values(), absmax):
            raise ValueError("expected nested scales that are the weight's, got others")
        state |= {
            "nested_blocksize": nested.blocksize,
            "nested_dtype": "float32",
            "nested_offset": nested.offset,
        }
        tensors = {
            "weight.absmax": nested.codes,
            "weight.nested_absmax": nested.absmax,
            "weight.nested_quant_map": nested.quant_map,
        }
    codes = weight.unpack().view(1, -1)
    packed = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    data = (packed[0, 0::2] << 4 | packed[0, 1::2]).view(storage)
    return {
        "weight": data.reshape((-1, 1) if shape is None else shape),
        "weight.quant_map": torch.tensor(TABLES[weight.codebook]),
        f"{_STATE}{weight.codebook}": _bytes(json.dumps(state).encode()),
        **tensors,
    }


def nest(weight: QTensor4, *, blocksize: int = 256) -> tuple[QTensor4, NestedScale]:
    """The weight with its scales in 8 bits, and these, for :func:`encode`; the codes stay.

    With a the scales and o their mean, per block of ``blocksize``: the code of the value of
    bitsandbytes' dynamic map nearest to (a - o) / max|a - o|.

    Raises:
        ValueError: the weight's scales are not float32, or its blocks not those of one row.
    """
    absmax = _by_blocks(weight, weight.group_size)
    offset = float(absmax.mean())
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -len(centred) % blocksize)).view(-1, blocksize)
    largest = padded.abs().amax(1)
    units = padded / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    quant_map = dynamic_map()
    codes = torch.bucketize(units, (quant_map[1:] + quant_map[:-1]) / 2)
    nested = NestedScale(
        codes=codes.flatten()[: len(centred)].to(torch.uint8),
        absmax=largest,
        quant_map=quant_map,
        offset=offset,
        blocksize=blocksize,
    )
    scale = nested.values().view(weight.scale.shape)
    return dataclasses.replace(weight, scale=scale), nested


def dynamic_map() -> torch.Tensor:
    """bitsandbytes' signed 8-bit map, float32 (256): seven powers of ten, each cut into twice as
    many steps as the one below."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = 10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))


def _by_rows(absmax: torch.Tensor, n: int, k: int, blocksize: int) -> tuple[torch.Tensor, int]:
    """Scales (N, G) of scales per block, and the group size."""
    if k and k % blocksize == 0:
        return absmax.view(n, k // blocksize), blocksize
    if k and blocksize % k == 0:
        rows = blocksize // k
        return absmax.repeat_interleave(rows)[:n, None].contiguous(), k
    raise ValueError(
        f"expected rows of whole blocks or blocks of whole rows, got {k} inputs and blocks of "
        f"{blocksize}"
    )


def _by_blocks(weight: QTensor4, blocksize: int) -> torch.Tensor:
    """The inverse of :func:`_by_rows`."""
    if weight.scale.dtype is not torch.float32:
        raise ValueError("expected scales of float32 for bitsandbytes, got bfloat16")
    n, k = weight.shape
    group = min(weight.group_size, max(k, 1))
    if group == blocksize and k % blocksize == 0:
        return weight.scale.flatten()
    if weight.groups == 1 and k and blocksize % k == 0:
        rows = blocksize // k
        absmax = weight.scale[::rows, 0].contiguous()
        if torch.equal(absmax.repeat_interleave(rows)[:n], weight.scale[:, 0]):
            return absmax
        raise ValueError(f"expected one scale for every {rows} rows, got several")
    raise ValueError(
        f"expected rows of whole blocks of {blocksize} for bitsandbytes, got {k} inputs in groups "
        f"of {weight.group_size}"
    )


def _read_state(raw: torch.Tensor, kind: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(raw.tolist()))
    except (ValueError, RecursionError):
        raise ValueError("expected a quantization state of JSON, got something else") from None
    if not isinstance(state, dict):
        raise ValueError("expected a quantization state that is a JSON object")
    if state.get("quant_type") != kind:
        raise ValueError(f"expected quant_type of {kind!r}, got {state.get('quant_type')!r}")
    shape = state.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape))):
        raise ValueError(f"expected shape of two sizes, got {shape!r}")
    if shape[0] * shape[1] > _MOST:
        raise ValueError(f"expected a shape of {_MOST} weights at most, got {shape!r}")
    for name in ("blocksize", *(["nested_blocksize"] if "nested_blocksize" in state else [])):
        value: Any = state.get(name)
        if not _is_size(value) or not 0 < value <= _MOST:
            raise ValueError(f"expected {name} of a positive integer, got {value!r}")
    dtype = state.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"expected dtype of {' or '.join(_DTYPES)}, got {dtype!r}")
    offset = state.get("nested_offset")
    if "nested_blocksize" in state and not isinstance(offset, float):
        raise ValueError(f"expected nested_offset of a number, got {offset!r}")
    return {**state, "dtype": _DTYPES[dtype], "shape": tuple(shape)}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _present(name: str, tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError(f"expected a tensor {name}, got none")
    return tensor


def _bytes(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)
