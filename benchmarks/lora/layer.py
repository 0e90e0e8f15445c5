"""One adapted linear layer on drawn operands: ours, PyTorch's expression of it, PEFT's layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import pyfastft as ft
from pyfastft.benchmarks.measure import DTYPES, OURS, Case
from pyfastft.reference._dropout import dropout
from pyfastft.testing.tolerance import assert_accurate

# A layer's alpha / R, as a tensor: what nn.LoRALinear holds.
SCALING = 2.0


@dataclass
class Operands:
    """One set of operands; B is not zero, or half of the work could be wrong unseen."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def draw(cls, case: Case, device: torch.device) -> Operands:
        m, k, n = case.shape
        dtype = DTYPES[case.dtype]

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, device=device) * std).to(dtype)

        # Parameters where a layer has them.
        return cls(
            x=normal(m, k).requires_grad_(),
            weight=torch.nn.Parameter(normal(n, k, std=k**-0.5), requires_grad=False),
            lora_a=torch.nn.Parameter(normal(case.rank, k, std=k**-0.5)),
            lora_b=torch.nn.Parameter(normal(n, case.rank, std=case.rank**-0.5)),
            scaling=torch.full((), SCALING, device=device),
            grad=normal(m, n),
        )

    def double(self) -> Operands:
        return Operands(
            *(
                value.detach().double().requires_grad_(value.requires_grad)
                for value in vars(self).values()
            )
        )

    @property
    def trained(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.lora_a, self.lora_b

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """What the layer holds anyway, whether or not something is saved for backward."""
        return self.weight, self.lora_a, self.lora_b, self.scaling

    def step(self, forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Forward and backward: y and the gradients of x, A, B."""
        y = forward()
        return y, *torch.autograd.grad(y, self.trained, self.grad)

    def ours(self, p: float, rng: torch.Tensor | None = None) -> torch.Tensor:
        return ft.lora_linear(
            self.x, self.weight, self.lora_a, self.lora_b, scaling=self.scaling, p=p, rng=rng
        )


def expression(
    x: torch.Tensor, x_hat: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """The layer as it is written by hand, for x_hat = dropout(x)."""
    return F.linear(x, weight) + F.linear(F.linear(x_hat, a), b) * SCALING


def dropped_expression(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, p: float
) -> torch.Tensor:
    return expression(x, F.dropout(x, p), weight, a, b)


@functools.cache
def compiled_expression() -> Callable[..., torch.Tensor]:
    # One for all sets of operands: a second one would be compiled again.
    return torch.compile(dropped_expression, fullgraph=True, dynamic=False)


def peft_layer(operands: Operands, p: float, **options: Any) -> Any:
    """PEFT's layer over nn.Linear with these very weights; options of its LoraConfig."""
    import peft

    n, k = operands.weight.shape
    base = torch.nn.Linear(k, n, bias=False, device="meta")
    base.weight = torch.nn.Parameter(operands.weight, requires_grad=False)
    rank = operands.lora_a.shape[0]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=int(SCALING * rank),
        lora_dropout=p,
        target_modules=["0"],
        **options,
    )
    adapted: Any = peft.inject_adapter_in_model(config, torch.nn.Sequential(base))
    layer = adapted[0]
    for holder, value in ((layer.lora_A, operands.lora_a), (layer.lora_B, operands.lora_b)):
        # A Parameter of the same storage would be another leaf; its gradient must be asked for.
        del holder["default"].weight
        holder["default"].weight = value
    return layer.train()


def gate(operands: Operands, p: float, layer: torch.nn.Module | None = None) -> None:
    """Hold ours, with dropout, and PEFT's layer, without, to the float64 reference.

    Raises:
        AssertionError: an output or a gradient is not accurate.
    """
    rng = torch.tensor([1, 2], device=operands.x.device)
    mine = operands.step(lambda: operands.ours(p, rng))
    hold(OURS, mine, operands, p, rng)
    if layer is not None:
        layer.eval()
        theirs = operands.step(lambda: layer(operands.x))
        layer.train()
        hold("peft", theirs, operands, 0.0, rng)


def hold(
    name: str, results: tuple[torch.Tensor, ...], operands: Operands, p: float, rng: torch.Tensor
) -> None:
    exact = operands.double()
    with ft.backend("reference"):
        truths = exact.step(lambda: exact.ours(p, rng))
    x, w = operands.x, operands.weight
    a, b = operands.lora_a, operands.lora_b
    naives = operands.step(lambda: expression(x, dropout(x, p, rng), w, a, b))
    for what, result, truth, naive in zip(
        ("y", "dx", "dA", "dB"), results, truths, naives, strict=True
    ):
        assert_accurate(
            result.detach(),
            truth.detach(),
            naive.detach(),
            gradient=what != "y",
            what=f"{name}: {what}",
        )


def saved_bytes(forward: Callable[[], Any], held: Sequence[torch.Tensor]) -> float:
    """Bytes of the storages that one forward keeps for its backward, those of ``held`` excluded."""
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return float(sum(storage.nbytes() for storage in saved.values()))
