"""The quantizers in plain PyTorch, in float32 at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from pyfastft._codebook import TABLES
from pyfastft._op import implement

_LEAST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


@dataclass
class _Groups:
    """A weight's groups (N, G, g), the last one filled up with zeros, ``inside`` where weights are;
    groups that are not finite are zeros, and marked in ``poisoned`` (N, G, 1)."""

    values: torch.Tensor
    inside: torch.Tensor
    poisoned: torch.Tensor
    k: int

    def low(self, *, with_zero: bool) -> torch.Tensor:
        """The least weight of each group (N, G, 1), 0 among them where asked for."""
        low = self.values.where(self.inside, torch.inf).amin(2, keepdim=True)
        return low.clamp(max=0) if with_zero else low

    def high(self, *, with_zero: bool) -> torch.Tensor:
        """The largest one."""
        high = self.values.where(self.inside, -torch.inf).amax(2, keepdim=True)
        return high.clamp(min=0) if with_zero else high

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The means of values (N, G, g) over each group's own weights."""
        return (values * self.inside).sum(2, keepdim=True) / self.inside.sum(1, keepdim=True)


def _groups(weight: torch.Tensor, group_size: int) -> _Groups:
    n, k = weight.shape
    group_size = min(group_size, max(k, 1))
    groups = -(-k // group_size)
    values = weight.to(torch.promote_types(weight.dtype, torch.float32))
    values = pad(values, (0, groups * group_size - k)).view(n, groups, group_size)
    inside = torch.arange(groups * group_size, device=weight.device).view(groups, group_size) < k
    span = values.float().amax(2, keepdim=True).clamp(min=0)
    span = span - values.float().amin(2, keepdim=True).clamp(max=0)
    poisoned = ~(values.isfinite().all(2, keepdim=True) & span.isfinite())
    return _Groups(values.masked_fill(poisoned, 0.0), inside, poisoned, k)


def _stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to a dtype and back; what is beyond float16 becomes its largest number."""
    largest = 65504.0 if dtype is torch.float16 else torch.inf
    return values.clamp(-largest, largest).to(dtype).to(values.dtype)


def _stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _stored(scale.clamp(min=_LEAST[dtype]), dtype)


def _write(
    groups: _Groups,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    values: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Codes (N, G, g), scales and zero-points (N, G, 1) into the op's outputs."""
    c, s, z = values
    flat = c.to(torch.uint8).flatten(1)[:, : groups.k]
    flat = pad(flat, (0, groups.k % 2))
    codes.copy_(flat[:, 0::2] | (flat[:, 1::2] << 4))
    scale.copy_(s.masked_fill(groups.poisoned, torch.nan).squeeze(2))
    if zero.numel():
        zero.copy_(z.squeeze(2))


def _nearest(units: torch.Tensor, codebook: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest values of a codebook, and their codes; the lower one of two."""
    values = torch.tensor(TABLES[codebook], device=units.device)
    levels, inverse = values.unique(return_inverse=True)
    # Of equal values the first code.
    codes = torch.tensor([inverse.tolist().index(i) for i in range(len(levels))])
    middles = ((levels[1:] + levels[:-1]) / 2).to(units.dtype)
    index = torch.bucketize(units, middles)
    return levels.to(units.dtype)[index], codes.to(units.device)[index]


@implement("rtn_quantize", "reference")
def rtn_quantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    group_size: int,
    codebook: str,
    symmetric: bool,
    grid: int,
    scale_dtype: torch.dtype,
) -> None:
    if not weight.numel():
        return
    groups = _groups(weight, group_size)
    w = groups.values
    low, high = groups.low(with_zero=True), groups.high(with_zero=True)
    largest = torch.maximum(-low, high)
    integers = codebook == "int4"
    base = (largest / 7.5 if symmetric else (high - low) / 15) if integers else largest
    best: list[torch.Tensor] = []
    for i in range(grid):
        clip = torch.tensor(1 - 0.5 * i / grid, dtype=torch.float32, device=w.device).to(w.dtype)
        s = _stored_scale(base * clip, scale_dtype)
        z = torch.full_like(s, 8.0)
        if integers and not symmetric:
            z = (-(low * clip) / s).round().clamp(0, 15)
        if integers:
            c = ((w / s).round() + z).clamp(0, 15)
            q = c - z
        else:
            q, c = _nearest(w / s, codebook)
        error = (w - s * q).square().sum(2, keepdim=True)
        if not best:
            best = [error, c, s, z]
        better = error < best[0]
        best = [new.where(better, old) for new, old in zip((error, c, s, z), best, strict=True)]
    _, c, s, z = best
    empty = largest == 0
    s, z = s.masked_fill(empty, 1.0), z.masked_fill(empty, 8.0)
    if integers:
        c = c.masked_fill(empty, 8)
    _write(groups, codes, scale, zero, (c, s, z))


@implement("hqq_quantize", "reference")
def hqq_quantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    group_size: int,
    round_zero: bool,
    iterations: int,
    power: float,
    beta: float,
    kappa: float,
    scale_dtype: torch.dtype,
) -> None:
    if not weight.numel():
        return
    groups = _groups(weight, group_size)
    w = groups.values
    low, high = groups.low(with_zero=round_zero), groups.high(with_zero=round_zero)
    base = (high - low) / 15
    s = torch.where(base > 0, _stored_scale(base, scale_dtype), 1.0)
    units = (w / s).clamp(-1e12, 1e12)

    def kept(z: torch.Tensor) -> torch.Tensor:
        return z if round_zero else _stored(z, scale_dtype)

    def errors(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The codes of z, their error, and its size, of which a power is taken."""
        c = (units + z).round().clamp(0, 15)
        e = w - s * (c - z)
        return c, e, e.abs().clamp(min=1e-12 * s)

    def loss_of(size: torch.Tensor) -> torch.Tensor:
        return (size.pow(power) * groups.inside).sum(2, keepdim=True)

    z = kept(-low / s)
    best, least = z, torch.full_like(z, torch.inf)
    for i in range(iterations + 1):
        c, e, size = errors(z)
        loss = loss_of(size)
        better = loss < least
        best, least = z.where(better, best), loss.where(better, least)
        sparse = e.sign() * (e.abs() - size.pow(power - 1) / (beta * kappa**i)).clamp(min=0)
        z = kept(groups.mean(c - (w - sparse) / s))
    if round_zero:
        below = best.floor().clamp(0, 15)
        above = (below + 1).clamp(max=15)
        lower, upper = (loss_of(errors(candidate)[2]) for candidate in (below, above))
        best = above.where(upper < lower, below)
    c = (units + best).round().clamp(0, 15)
    _write(groups, codes, scale, zero, (c, s, best))
