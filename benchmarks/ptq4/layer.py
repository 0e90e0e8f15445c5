"""4-bit layers on drawn operands: ours, ATen's int4 product, bitsandbytes, and PyTorch's dense one.

torchao's int4 weights on a CPU run ATen's product, so it is no peer of its own.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import pyfastft as ft
from pyfastft import ops
from pyfastft.benchmarks import probe
from pyfastft.benchmarks.measure import OURS, quiet_times
from pyfastft.benchmarks.timer import Candidate, summarise

GROUP, NF4_GROUP = 128, 64
# Operands rotate over more than this: more than the last-level cache of a small machine holds.
_ROTATION_BYTES = 64 << 20


@dataclass
class Weight:
    """One weight (N, K) in 4 bits, symmetric in groups of 128 and as nf4 in groups of 64."""

    dense: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    nf4_codes: torch.Tensor
    nf4_scale: torch.Tensor

    @classmethod
    def draw(cls, n: int, k: int) -> Weight:
        dense = torch.randn(n, k) * k**-0.5
        groups = dense.view(n, k // GROUP, GROUP)
        scale = groups.abs().amax(-1) / 7.5
        codes = (groups / scale[..., None]).round().clamp(-8, 7).add(8).to(torch.uint8).view(n, k)
        nf4 = {"group_size": NF4_GROUP, "codebook": "nf4", "grid": 1}
        nf4_codes, nf4_scale, _ = ft.functional.rtn_quantize(dense, **nf4)
        pairs = codes[:, ::2] | codes[:, 1::2] << 4
        return cls(dense.bfloat16(), pairs, scale, nf4_codes, nf4_scale)

    def ours(self, x: torch.Tensor) -> torch.Tensor:
        return ft.functional.int4_linear(x, self.codes, self.scale, group_size=GROUP)

    def ours_nf4(self, x: torch.Tensor) -> torch.Tensor:
        return ft.functional.int4_linear(
            x, self.nf4_codes, self.nf4_scale, group_size=NF4_GROUP, codebook="nf4"
        )

    def input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """dX of the nf4 weight."""
        return ops.int4_linear_backward(
            *(grad, None, self.nf4_codes, self.nf4_scale, None, None, None),
            *(self.dense.shape[1], NF4_GROUP, "nf4", [True, False, False, False]),
        )[0]

    def dequantized(self) -> torch.Tensor:
        return ft.functional.int4_dequantize(self.codes, self.scale, group_size=GROUP)

    def aten(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """ATen's product, of the codes packed once as it wants them."""
        values = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(1).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        pairs = torch.stack((self.scale, torch.zeros_like(self.scale)), dim=-1)
        pairs = pairs.transpose(0, 1).contiguous().bfloat16()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, pairs)

    def bnb_linear(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """bitsandbytes' layer on its own nf4 codes, as it runs in inference."""
        return bnb_layer(self).eval()


def why_no_bitsandbytes() -> str | None:
    """Why there is nothing of bitsandbytes' to measure; None where there is."""
    found = importlib.util.find_spec("bitsandbytes")
    return "bitsandbytes is not installed" if found is None else None


def bnb_dequantize(weight: Weight) -> Callable[[], torch.Tensor]:
    """bitsandbytes' dense bfloat16 weight, made of its nf4 codes by every call."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight.dense.float(), blocksize=NF4_GROUP, quant_type="nf4")
    state.dtype = torch.bfloat16
    return lambda: bnb.dequantize_4bit(packed, state)


def bnb_layer(weight: Weight) -> Any:
    """bitsandbytes' Linear4bit of a weight's values, computing in bfloat16."""
    import bitsandbytes as bnb

    n, k = weight.dense.shape
    layer = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False
    )
    layer.weight = bnb.nn.Params4bit(
        weight.dense.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    return layer.to("cpu")


def rotated(n: int, k: int) -> list[Weight]:
    """As many weights of one size as no last-level cache holds in 4 bits."""
    return [Weight.draw(n, k) for _ in range(_ROTATION_BYTES // (n * k // 2) + 1)]


def times(
    steps: Mapping[str, list[Callable[[], Any]]], budget_s: float = 6.0
) -> tuple[dict[str, float], float]:
    """Median seconds of each candidate, whose steps take turns, and the bytes a second read."""
    device = torch.device("cpu")
    arithmetic = probe.arithmetic(torch.bfloat16, device)
    reading = probe.reading(4 * _ROTATION_BYTES, device)
    candidates = {name: Candidate(several) for name, several in steps.items()}
    found, _ = quiet_times(
        {"arithmetic": arithmetic.candidate, "reading": reading.candidate, **candidates},
        device,
        budget_s=budget_s,
        min_rounds=7,
    )
    medians = {name: summarise(samples).median for name, samples in found.items()}
    return medians, reading.work / medians["reading"]


def ratios(found: Mapping[str, float], label: str) -> dict[str, float | str]:
    """How many times faster than each peer ours is."""
    others = itertools.filterfalse(lambda name: name in (OURS, "arithmetic", "reading"), found)
    return {f"{label} over {name}": found[name] / found[OURS] for name in others}
