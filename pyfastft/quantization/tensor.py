"""QTensor4: a matrix in 4 bits, as every format, quantizer and kernel here knows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from pyfastft import ops
from pyfastft._check import expect_dense, expect_dtype, expect_shape, reject
from pyfastft._codebook import CODEBOOKS

__all__ = ["QTensor4", "pack_codes", "unpack_codes"]

SCALES = (torch.float32, torch.bfloat16)
_NAME = "QTensor4"
# The tensors of a QTensor4, and how files and layers' buffers name them: an adapted layer has a
# scale of its own.
TENSORS = {"codes": "codes", "scale": "scales", "zero": "zeros", "perm": "perm"}
LAYOUT = "layout"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class QTensor4:
    r"""A matrix W (N, K) in 4-bit codes with a scale, and possibly a zero-point, per group of K.

    .. math::
        W_{n, \pi(j)} = s_{n, \lfloor j / g \rfloor} \, (c_{nj} - z_{n, \lfloor j / g \rfloor})
        \quad\text{or}\quad s_{n, \lfloor j / g \rfloor} \, \mathrm{table}[c_{nj}]

    Plain tensors in a frozen class, not a subclass of Tensor: nothing has to be intercepted, so
    nothing can be by mistake (a cast of the scales by ``half()``, a view that splits a byte), and
    ``torch.save``, safetensors, ``deepcopy`` and ``torch.compile`` see tensors that they know.
    Immutable: what a backend packs otherwise is derived from it and never replaces it.

    Args:
        codes: uint8 (N, ceil(K / 2)), the even j in the low half of a byte; the unused half of the
            last byte of an odd K is 0.
        scale: s (N, G) with G = ceil(K / g); float32 or bfloat16, finite.
        zero: z (N, G): None, which is 8, uint8 up to 15, or of the scale's dtype; None beside nf4
            and fp4.
        perm: pi, int32 (K), a permutation: the input feature that place j stands for. None is the
            identity.
        k: K.
        group_size: g; the last group may be shorter, and g >= K is one group per row.
        codebook: ``"int4"``, ``"nf4"`` or ``"fp4"``.

    Raises:
        ValueError, TypeError: an argument does not fit. All values are checked, so that a kernel
            never reads outside of x.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    k: int
    group_size: int
    codebook: str = "int4"

    def __post_init__(self) -> None:
        _expect_layout(self.k, self.group_size, self.codebook)
        expect_dense(_NAME, None, codes=self.codes)
        expect_dtype(_NAME, "codes", self.codes, (torch.uint8,))
        expect_shape(_NAME, "codes", self.codes, ("N", (self.k + 1) // 2), f"for k = {self.k}")
        n, groups = self.codes.shape[0], self.groups
        grid = (n, groups)
        expect_dense(_NAME, self.codes.device, scale=self.scale)
        expect_dtype(_NAME, "scale", self.scale, SCALES)
        expect_shape(_NAME, "scale", self.scale, grid, f"for groups of {self.group_size}")
        if self.zero is not None:
            if self.codebook != "int4":
                reject(_NAME, "zero", "None", "a tensor", because=f"beside {self.codebook}")
            expect_dense(_NAME, self.codes.device, zero=self.zero)
            expect_dtype(_NAME, "zero", self.zero, (torch.uint8, self.scale.dtype))
            expect_shape(_NAME, "zero", self.zero, grid, "to match scale")
        if self.perm is not None:
            expect_dense(_NAME, self.codes.device, perm=self.perm)
            expect_dtype(_NAME, "perm", self.perm, (torch.int32,))
            expect_shape(_NAME, "perm", self.perm, (self.k,), "to match k")
        for name in TENSORS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, value.detach().contiguous())
        if not self.codes.is_meta:
            self._expect_values()

    def _expect_values(self) -> None:
        if self.k % 2 and bool((self.codes[:, -1] > 15).any()):
            reject(_NAME, "codes", "0 in the unused half of a byte", "another value")
        if not bool(torch.isfinite(self.scale).all()):
            reject(_NAME, "scale", "finite values", "a NaN or an infinity")
        if self.zero is not None:
            if self.zero.dtype is torch.uint8:
                if self.zero.numel() and int(self.zero.max()) > 15:
                    reject(_NAME, "zero", "values up to 15", int(self.zero.max()))
            elif not bool(torch.isfinite(self.zero).all()):
                reject(_NAME, "zero", "finite values", "a NaN or an infinity")
        if self.perm is not None:
            expected = torch.arange(self.k, dtype=torch.int32, device=self.perm.device)
            if not torch.equal(self.perm.sort().values, expected):
                reject(_NAME, "perm", f"a permutation of 0 to {self.k - 1}", "another one")

    # -- making one --------------------------------------------------------------------------------

    @classmethod
    def from_codes(cls, codes: torch.Tensor, scale: torch.Tensor, **fields: Any) -> QTensor4:
        """One of codes (N, K), uint8 up to 15, one in a byte; the other arguments as of the class.

        Raises:
            ValueError, TypeError: an argument does not fit.
        """
        return cls(codes=pack_codes(codes), scale=scale, k=codes.shape[1], **fields)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> QTensor4:
        """One of what :meth:`tensors` gave.

        Raises:
            ValueError, TypeError: a tensor is missing, left over, or does not fit.
        """
        for name in (TENSORS["codes"], TENSORS["scale"], LAYOUT):
            if name not in tensors:
                reject(_NAME, "tensors", f"a tensor {name!r}", ", ".join(sorted(tensors)) or "none")
        if left_over := sorted(tensors.keys() - {*TENSORS.values(), LAYOUT}):
            reject(_NAME, "tensors", ", ".join((*TENSORS.values(), LAYOUT)), left_over[0])
        k, group_size, codebook = read_layout(tensors[LAYOUT])
        fields: dict[str, Any] = {field: tensors.get(name) for field, name in TENSORS.items()}
        return cls(
            **fields,
            k=k,
            group_size=group_size,
            codebook=codebook,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as tensors, for a safetensors file or a state dict: ``codes``, ``scales``,
        ``zeros`` and ``perm`` where there are some, and ``layout`` (3), int64: K, the group size
        and the codebook's number."""
        named = {name: getattr(self, field) for field, name in TENSORS.items()}
        named[LAYOUT] = self.layout()
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def layout(self) -> torch.Tensor:
        """K, the group size and the codebook's number, int64 on the CPU."""
        return torch.tensor([self.k, self.group_size, CODEBOOKS.index(self.codebook)])

    # -- reading it --------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def groups(self) -> int:
        """G, the groups of a row."""
        return -(-self.k // self.group_size)

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return torch.Size((self.n, self.k))

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """How many bytes its tensors take."""
        return sum(t.nbytes for t in self.tensors().values())

    def unpack(self) -> torch.Tensor:
        """The codes (N, K), uint8, one in a byte, in the order in which they are stored."""
        return unpack_codes(self.codes, self.k)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W (N, K) by input feature, computed in float32 (float64 for float64) and rounded once, as
        :func:`pyfastft.functional.int4_dequantize` says.

        Args:
            dtype: of the result; the scale's where absent.
        """
        return ops.int4_dequantize(
            *(self.codes, self.scale, self.zero, self.perm, self.k, self.group_size),
            *(self.codebook, self.scale.dtype if dtype is None else dtype),
        )

    def to(self, device: torch.device | str) -> QTensor4:
        """The same on another device; itself where it is there. No dtype is ever changed."""
        if torch.empty(0, device=device).device == self.device:
            return self
        moved = {name: getattr(self, name) for name in TENSORS}
        moved = {name: None if t is None else t.to(device) for name, t in moved.items()}
        return dataclasses.replace(self, **moved)

    def equal(self, other: QTensor4) -> bool:
        """Whether all codes, scales, zero-points, the order and the layout are the same."""
        mine, theirs = self.tensors(), other.tensors()
        return mine.keys() == theirs.keys() and all(
            mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])
            for name in mine
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # By tensors and plain values alone: torch.load(weights_only=True) rebuilds it, checked.
        return _rebuild, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __repr__(self) -> str:
        zero = "none" if self.zero is None else str(self.zero.dtype).removeprefix("torch.")
        return (
            f"QTensor4({self.n} x {self.k}, {self.codebook}, group_size={self.group_size}, "
            f"scale={str(self.scale.dtype).removeprefix('torch.')}, zero={zero}"
            f"{'' if self.perm is None else ', permuted'}, device={str(self.device)!r})"
        )


def _rebuild(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    perm: torch.Tensor | None,
    k: int,
    group_size: int,
    codebook: str,
) -> QTensor4:
    return QTensor4(
        codes=codes,
        scale=scale,
        zero=zero,
        perm=perm,
        k=k,
        group_size=group_size,
        codebook=codebook,
    )


torch.serialization.add_safe_globals([QTensor4, _rebuild])


def read_layout(layout: torch.Tensor) -> tuple[int, int, str]:
    """K, the group size and the codebook of what :meth:`QTensor4.layout` gave."""
    expect_dense(_NAME, None, layout=layout)
    expect_dtype(_NAME, "layout", layout, (torch.int64,))
    expect_shape(_NAME, "layout", layout, (3,))
    k, group_size, number = layout.tolist()
    if not 0 <= number < len(CODEBOOKS):
        reject(_NAME, "layout", f"a codebook below {len(CODEBOOKS)}", number)
    _expect_layout(k, group_size, CODEBOOKS[number])
    return k, group_size, CODEBOOKS[number]


def _expect_layout(k: int, group_size: int, codebook: str) -> None:
    for name, value, least in (("k", k, 0), ("group_size", group_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            reject(_NAME, name, "type int", type(value).__name__, error=TypeError)
        if value < least:
            reject(_NAME, name, f"at least {least}", value)
    if codebook not in CODEBOOKS:
        reject(_NAME, "codebook", " or ".join(map(repr, CODEBOOKS)), repr(codebook))


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes (N, K), uint8 up to 15, two in a byte: (N, ceil(K / 2)), the even k in the low half.

    Raises:
        ValueError, TypeError: the codes are of another kind.
    """
    expect_dense(_NAME, None, codes=codes)
    expect_dtype(_NAME, "codes", codes, (torch.uint8,))
    expect_shape(_NAME, "codes", codes, ("N", "K"))
    if codes.numel() and not codes.is_meta and int(codes.max()) > 15:
        reject(_NAME, "codes", "values up to 15", int(codes.max()))
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_codes(packed: torch.Tensor, k: int) -> torch.Tensor:
    """The inverse of :func:`pack_codes`: (N, K)."""
    return torch.stack((packed & 15, packed >> 4), 2).flatten(1)[:, :k].contiguous()
