"""The ptq4 family: one layer with a 4-bit weight beside the same layer in torch.

A case of rank 0 is the forward of int4_linear, symmetric int4 in groups of 128, beside torch's GEMM
on the dense weight of the same dtype: what 4 bits have to beat. A case with a rank is QLoRA's
training step, forward and backward of int4_lora_linear on nf4 in groups of 64, beside what torch
does without such an op: W out of its codes each way, then dense products.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import pyfastft as ft
from pyfastft.benchmarks.lora.layer import SCALING
from pyfastft.benchmarks.measure import DTYPES, OURS, Case, Workload
from pyfastft.benchmarks.ptq4 import weight_only
from pyfastft.benchmarks.ptq4.activations import quantized_activations
from pyfastft.functional import int4_dequantize, int4_linear, int4_lora_linear
from pyfastft.testing.tolerance import assert_accurate

OP = "int4_linear"
_TOKENS_ON_CPU = (1, 4, 16, 64, 256)
_TOKENS_ON_CUDA = (1, 4, 16, 64, 96, 128, 256, 1024, 4096)
CASES = {
    "cpu": (
        *(Case((m, 4096, 4096), 0, 0.0, "bfloat16") for m in _TOKENS_ON_CPU),
        Case((1, 4096, 14336), 0, 0.0, "bfloat16"),
        Case((512, 1024, 4096), 16, 0.05, "bfloat16"),
    ),
    "cuda": (
        *(Case((m, 4096, 14336), 0, 0.0, "bfloat16") for m in _TOKENS_ON_CUDA),
        *(Case((m, 4096, 4096), 0, 0.0, "bfloat16") for m in _TOKENS_ON_CUDA),
        Case((512, 4096, 4096), 16, 0.05, "bfloat16"),
        Case((8192, 4096, 4096), 16, 0.05, "bfloat16"),
        Case((4096, 4096, 14336), 64, 0.05, "bfloat16"),
    ),
}
QUICK = Case((16, 1024, 1024), 0, 0.0, "bfloat16")
FIGURES: dict[str, Callable[..., Mapping[str, float | str]]] = {
    "quantized_activations": quantized_activations,
    "forward": weight_only.forward,
    "forward_wide": weight_only.forward_wide,
    "input_gradient": weight_only.input_gradient,
    "error": weight_only.error,
    "qlora": weight_only.qlora,
}


@dataclass
class Operands:
    """A layer's operands; without a rank there is no adapter, and nothing is trained."""

    x: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    dense: torch.Tensor
    group_size: int
    codebook: str
    adapter: tuple[torch.Tensor, ...] = ()
    grad: torch.Tensor | None = None

    @classmethod
    def draw(cls, case: Case, device: torch.device) -> Operands:
        (m, k, n), dtype = case.shape, DTYPES[case.dtype]
        codebook, group = ("nf4", 64) if case.rank else ("int4", 128)
        x = torch.randn(m, k, device=device).to(dtype)
        codes = torch.randint(256, (n, -(-k // 2)), dtype=torch.uint8, device=device)
        if k % 2:
            codes[:, -1] &= 15
        # As large as those of a layer whose outputs are of the size of its inputs.
        scale = torch.rand(n, -(-k // group), device=device) * (0.4 if codebook == "int4" else 2)
        scale *= k**-0.5
        format = {"group_size": group, "codebook": codebook}
        dense = int4_dequantize(codes, scale, k=k, dtype=dtype, **format)
        drawn = cls(x, codes, scale, dense, **format)
        if case.rank:
            drawn.x.requires_grad_()
            a = (torch.randn(case.rank, k, device=device) * k**-0.5).to(dtype)
            b = (torch.randn(n, case.rank, device=device) * case.rank**-0.5).to(dtype)
            drawn.adapter = (a.requires_grad_(), b.requires_grad_())
            drawn.grad = torch.randn(m, n, device=device).to(dtype)
        return drawn

    def double(self) -> Operands:
        def one(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        return Operands(
            one(self.x),
            self.codes,
            self.scale.double(),
            one(self.dense),
            self.group_size,
            self.codebook,
            tuple(map(one, self.adapter)),
            None if self.grad is None else one(self.grad),
        )

    def ours(self, p: float, rng: torch.Tensor | None = None) -> torch.Tensor:
        format = {"group_size": self.group_size, "codebook": self.codebook}
        if not self.adapter:
            return int4_linear(self.x, self.codes, self.scale, **format)
        weight = (self.x, self.codes, self.scale, *self.adapter)
        return int4_lora_linear(*weight, scaling=SCALING, p=p, rng=rng, **format)

    def torchs(self, p: float) -> torch.Tensor:
        if not self.adapter:
            return F.linear(self.x, self.dense)
        a, b = self.adapter
        low_rank = F.linear(F.linear(F.dropout(self.x, p), a), b)
        return _DequantizedLinear.apply(self.x, self) + low_rank * SCALING

    def step(self, forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The forward; with an adapter also the gradients of x, A and B."""
        if not self.adapter:
            with torch.no_grad():
                return (forward(),)
        y = forward()
        return y, *torch.autograd.grad(y, (self.x, *self.adapter), self.grad)


class _DequantizedLinear(torch.autograd.Function):
    """x W^T with W out of its codes, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, operands: Operands) -> torch.Tensor:
        ctx.operands = operands
        return F.linear(x, _dequantized(operands))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ _dequantized(ctx.operands), None


def _dequantized(o: Operands) -> torch.Tensor:
    format = {"group_size": o.group_size, "codebook": o.codebook}
    return int4_dequantize(o.codes, o.scale, k=o.x.shape[-1], dtype=o.x.dtype, **format)


def _gate(drawn: Operands) -> None:
    """Hold ours, nothing dropped, to the float64 reference."""
    exact = drawn.double()
    mine = drawn.step(lambda: drawn.ours(0.0))
    with ft.backend("reference"):
        truths = exact.step(lambda: exact.ours(0.0))
    naives = drawn.step(lambda: drawn.torchs(0.0))
    names = ("y", "dx", "dA", "dB")
    for name, one, truth, naive in zip(names, mine, truths, naives, strict=False):
        details = {"gradient": name != "y", "what": name}
        assert_accurate(one.detach(), truth.detach(), naive.detach(), **details)


def _cost(case: Case) -> tuple[int, int]:
    """Operations, and bytes that cannot be avoided to be read and written."""
    (m, k, n), r, itemsize = case.shape, case.rank, DTYPES[case.dtype].itemsize
    weight = n * k // 2 + 4 * n * -(-k // (64 if r else 128))
    activations = itemsize * m * (k + n)
    if not r:
        return 2 * m * k * n, weight + activations
    adapter = itemsize * r * (k + n)
    return 4 * m * k * n + 6 * m * r * (k + n), 2 * weight + 2 * activations + 3 * adapter


def prepare(case: Case, device: torch.device, peers: Collection[str]) -> Workload:
    """See :mod:`pyfastft.benchmarks.measure`."""
    drawn = Operands.draw(case, device)
    forwards: dict[str, Callable[[], torch.Tensor]] = {OURS: lambda: drawn.ours(case.p)}
    if "pytorch" in peers:
        forwards["pytorch"] = lambda: drawn.torchs(case.p)
    absent = {
        peer: "no such layer to compare with" for peer in peers if peer not in ("pytorch", OURS)
    }
    operands = (drawn.x, drawn.codes, drawn.scale, None, None, None, None)
    format = (drawn.group_size, drawn.codebook)
    flops, size = _cost(case)
    return Workload(
        steps={name: lambda f=forward: drawn.step(f) for name, forward in forwards.items()},
        absent=absent,
        gate=lambda: _gate(drawn),
        backend=str(ft.explain(OP, *operands, *format).chosen),
        flops=flops,
        bytes=size,
    )


def bench_int4_linear(record: Callable[[Case], None], case: Case) -> None:
    """A layer's step; the peers' figures are in extra_info."""
    record(case)
