"""The functions over the ops against PEFT's layers: projections, adapters, DoRA, tile sums."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import pyfastft as ft
from pyfastft.testing.tolerance import assert_accurate, assert_exact

F = ft.functional
K, R = 12, 3


def peft_model(layers: dict[str, nn.Module], adapters: int = 1, **options) -> peft.PeftModel:
    """PEFT's layers over these, their adapters drawn at random."""
    config = peft.LoraConfig(
        r=R, lora_alpha=2 * R, target_modules=list(layers), init_lora_weights=False, **options
    )
    model = peft.get_peft_model(nn.ModuleDict(layers), config, "a0")
    for j in range(1, adapters):
        model.add_adapter(f"a{j}", config)
    return model


def factors(layer, adapter: str = "a0") -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def held_to(ours, theirs, inputs: list[torch.Tensor], parameters) -> None:
    """Outputs and gradients against the model in float64, beside those of the model itself.

    ``ours`` and ``theirs`` take a PEFT model and x; ``parameters`` picks the leaves of a model.
    """
    model, x = inputs
    wide = copy.deepcopy(model).double()
    results = []
    for one, function in ((model, ours), (wide, theirs), (model, theirs)):
        leaf = x.detach().to(next(one.parameters()).dtype).requires_grad_()
        y = function(one, leaf)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        leaves = [leaf, *parameters(one)]
        results.append([y.detach(), *torch.autograd.grad(y, leaves, weights)])
    for i, (mine, truth, naive) in enumerate(zip(*results, strict=True)):
        assert_accurate(mine, truth, naive, gradient=i > 0, what=f"result {i}")


def test_three_projections_are_three_of_pefts_layers() -> None:
    sizes = {"q": 8, "k": 5, "v": 5}
    model = peft_model({name: nn.Linear(K, n, bias=name != "k") for name, n in sizes.items()})
    layers = lambda m: [m.base_model.model[name] for name in sizes]  # noqa: E731

    def ours(m, x):
        a, b = zip(*map(factors, layers(m)), strict=True)
        bases = [layer.base_layer for layer in layers(m)]
        weights, biases = [base.weight for base in bases], [base.bias for base in bases]
        return torch.cat(F.lora_projections(x, weights, a, b, biases=biases, scaling=2.0), -1)

    held_to(
        ours,
        lambda m, x: torch.cat([layer(x) for layer in layers(m)], -1),
        [model, torch.randn(2, 7, K)],
        lambda m: [p for layer in layers(m) for p in factors(layer)],
    )


def test_projections_drop_as_layers_of_their_own_seeds() -> None:
    x, weight = torch.randn(9, K), torch.randn(5, K)
    a, b = [torch.randn(R, K) for _ in range(2)], [torch.randn(5, R) for _ in range(2)]
    rng = torch.tensor([11, 3])
    ys = F.lora_projections(x, [weight] * 2, a, b, p=[0.5, 0.25], scaling=[1.0, 3.0], rng=rng)
    for j, (y, p, s) in enumerate(zip(ys, (0.5, 0.25), (1.0, 3.0), strict=True)):
        own = rng + torch.tensor([j, 0])
        wide = [t.double() for t in (x, weight, a[j], b[j])]
        truth = ft.lora_linear(*wide, p=p, scaling=s, rng=own)
        naive = ft.lora_linear(x, weight, a[j], b[j], p=p, scaling=s, rng=own)
        assert_accurate(y, truth, naive, what=f"projection {j}")


INDICES = {
    "a sample each": [1, -1, 0, 1],
    "sorted": [0, 0, 1, -1],
    "one adapter": [1, 1, 1, 1],
    "the base alone": [-1, -1, -1, -1],
    "a row each": torch.tensor([[1, 0, -1], [2, 2, 2], [-1, 0, 0], [0, 1, 2]], dtype=torch.int32),
}


@pytest.mark.parametrize("name", INDICES)
def test_mixed_adapters_are_pefts(name: str) -> None:
    """PEFT mixes by sample in inference; here each row is a sample of its own."""
    index = INDICES[name]
    model = peft_model({"q": nn.Linear(K, 5)}, adapters=3).eval()
    q = lambda m: m.base_model.model["q"]  # noqa: E731
    per_row = torch.as_tensor(index)
    if per_row.dim() == 1:
        per_row = per_row[:, None].expand(4, 3)
    names = [f"a{j}" if j >= 0 else "__base__" for j in per_row.reshape(-1).tolist()]

    def ours(m, x):
        a, b = zip(*(factors(q(m), f"a{j}") for j in range(3)), strict=True)
        base = q(m).base_layer
        return F.lora_adapters(x, base.weight, a, b, index, bias=base.bias, scaling=2.0)

    def theirs(m, x):
        return q(m)(x.reshape(12, 1, K), adapter_names=names).reshape(4, 3, 5)

    held_to(ours, theirs, [model, torch.randn(4, 3, K)], lambda m: [])


def test_gradients_of_mixed_adapters() -> None:
    ranks, index = (2, 4, 1), [2, 0, -1, 0, 2]
    x, weight, bias = torch.randn(5, 3, K), torch.randn(6, K), torch.randn(6)
    a, b = [torch.randn(r, K) for r in ranks], [torch.randn(6, r) for r in ranks]
    scaling = [1.0, 2.0, 0.5]

    def rowwise(x, weight, bias, *ab):
        return torch.stack(
            [
                x[i] @ weight.T + bias + (0 if j < 0 else scaling[j] * x[i] @ ab[j].T @ ab[3 + j].T)
                for i, j in enumerate(index)
            ]
        )

    def ours(x, weight, bias, *ab):
        return F.lora_adapters(x, weight, ab[:3], ab[3:], index, bias=bias, scaling=scaling)

    grad = torch.randn(5, 3, 6)
    results = []
    for function, dtype in ((ours, None), (rowwise, torch.float64), (rowwise, None)):
        operands = (x, weight, bias, *a, *b)
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in operands]
        y = function(*leaves)
        found = torch.autograd.grad(y, leaves, grad.to(y.dtype), allow_unused=True)
        found = [
            torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)
        ]
        results.append([y.detach(), *found])
    for i, (mine, truth, naive) in enumerate(zip(*results, strict=True)):
        assert_accurate(mine, truth, naive, gradient=i > 0, what=f"result {i}")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1], r"index of one number per sample or row to match x .*got \(2,\)"),
        ([0, 3, 0, 0], "index of numbers from -1 to 2, got 0 to 3"),
        ([0, -2, 0, 0], "index of numbers from -1 to 2, got -2 to 0"),
        (torch.zeros(4), "index of integers"),
    ],
)
def test_an_index_that_does_not_fit(index, message: str) -> None:
    a, b = [torch.randn(R, K)] * 3, [torch.randn(5, R)] * 3
    with pytest.raises((TypeError, ValueError), match=f"lora_adapters: expected {message}"):
        F.lora_adapters(torch.randn(4, 2, K), torch.randn(5, K), a, b, index)


def test_no_rows_and_no_samples() -> None:
    a, b, weight = [torch.randn(R, K)], [torch.randn(5, R)], torch.randn(5, K)
    assert F.lora_adapters(torch.randn(0, 2, K), weight, a, b, []).shape == (0, 2, 5)
    assert F.lora_adapters(torch.randn(2, 0, K), weight, a, b, [0, -1]).shape == (2, 0, 5)


@pytest.mark.parametrize("bias", [False, True])
def test_dora_is_pefts_without_dropout(bias: bool) -> None:
    model = peft_model({"q": nn.Linear(K, 7, bias=bias)}, use_dora=True)
    q = lambda m: m.base_model.model["q"]  # noqa: E731
    magnitude = lambda m: q(m).lora_magnitude_vector["a0"].weight  # noqa: E731
    with torch.no_grad():
        magnitude(model).mul_(torch.linspace(0.5, 2, 7))

    def ours(m, x):
        base = q(m).base_layer
        squared = base.weight.detach().square().sum(1)
        y = F.dora_linear(x, base.weight, *factors(q(m)), magnitude(m), bias=base.bias, scaling=2.0)
        known = F.dora_linear(
            x,
            base.weight,
            *factors(q(m)),
            magnitude(m),
            bias=base.bias,
            scaling=2.0,
            squared=squared,
        )
        assert_accurate(known.detach(), y.detach().double(), y.detach())
        return y

    held_to(
        ours,
        lambda m, x: q(m)(x),
        [model, torch.randn(3, 4, K)],
        lambda m: [*factors(q(m)), magnitude(m)],
    )


def test_pegos_sums() -> None:
    n, r = 9, 2
    w, a, b = torch.randn(n, n), torch.randn(r, n), torch.randn(n, r)

    def ours(w, a, b):
        return F.abs_row_sums(w @ a.T, b).sum()

    def authors(w, a, b):
        return (w @ (b @ a).T).abs().sum()

    results = []
    for function, dtype in ((ours, w.dtype), (authors, torch.float64), (authors, w.dtype)):
        leaves = [t.to(dtype).requires_grad_() for t in (w, a, b)]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves[1:])])
    for i, (mine, truth, naive) in enumerate(zip(*results, strict=True)):
        assert_accurate(mine, truth, naive, gradient=i > 0, what=f"result {i}")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packing_is_undone(dtype: torch.dtype, transposed: bool) -> None:
    weight = torch.randn(7, 13, dtype=dtype)
    packed = F.pack_weight(weight, transposed=transposed)
    assert_exact(F.unpack_weight(packed, 7, 13, dtype, transposed=transposed), weight)
