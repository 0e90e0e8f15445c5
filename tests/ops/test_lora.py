"""What is special to the lora family: the dropout mask as it is fixed, and identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import pyfastft as ft
from pyfastft._random import dropout_scale, dropout_threshold
from pyfastft.ops import lora_linear
from pyfastft.reference._dropout import keep_mask, philox4x32
from pyfastft.testing.tolerance import assert_exact

# The known answers of Random123 for Philox4x32-10: key, counter, words.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 2,
        (0xFFFFFFFF,) * 4,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


MASK_OF_ZERO = "1011111111000110100000001100010011110111"
MASK_OF_THREE = "0011101010001101011100110111100010001010"


def signed64(low: int, high: int) -> torch.Tensor:
    value = low | high << 32
    return torch.tensor(value - (1 << 64) if value >> 63 else value)


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(key, counter, words) -> None:
    drawn = philox4x32(signed64(*key), signed64(*counter[:2])[None], signed64(*counter[2:]))
    assert tuple(int(word) for word in drawn) == words


def test_the_mask_is_fixed() -> None:
    """Bits of the first elements of two streams: they may never change."""
    for rng, expected in (((0, 0), MASK_OF_ZERO), ((3, 1 << 40), MASK_OF_THREE)):
        mask = keep_mask(40, dropout_threshold(0.5), torch.tensor(rng))
        assert "".join("1" if bit else "0" for bit in mask) == expected


def test_the_mask_of_zero_follows_from_the_known_answer() -> None:
    words = KNOWN_ANSWERS[0][2]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    expected = "".join("1" if half >= 32768 else "0" for half in halves)
    assert MASK_OF_ZERO.startswith(expected)


def test_scale_belongs_to_the_threshold() -> None:
    """The expectation over all 65536 draws is exactly one."""
    for p in (0.05, 0.1, 0.5, 1 / 3):
        threshold = dropout_threshold(p)
        assert dropout_scale(threshold) * (65536 - threshold) / 65536 == pytest.approx(1, abs=0)
    assert dropout_scale(dropout_threshold(1.0)) == 0.0


def test_the_mask_keeps_its_share_and_streams_are_independent() -> None:
    elements, p = 200_000, 0.1
    threshold = dropout_threshold(p)
    masks = [keep_mask(elements, threshold, torch.tensor([7 + j, 0])) for j in range(3)]
    kept = 1 - threshold / 65536
    for mask in masks:
        sigma = math.sqrt(kept * (1 - kept) / elements)
        assert abs(mask.double().mean() - kept) < 7 * sigma
    both = (masks[0] & masks[1]).double().mean()
    sigma = math.sqrt(kept**2 * (1 - kept**2) / elements)
    assert abs(both - kept**2) < 7 * sigma


def problem(m: int = 6, n: int = 5, k: int = 16, r: int = 4) -> tuple[torch.Tensor, ...]:
    return torch.randn(m, k), torch.randn(n, k), torch.randn(r, k), torch.randn(n, r)


def test_no_dropout_consumes_no_random_state() -> None:
    before = torch.get_rng_state()
    ft.lora_linear(*problem(), p=0.0)
    after_problem = torch.get_rng_state()
    torch.set_rng_state(before)
    problem()
    assert torch.equal(torch.get_rng_state(), after_problem)
    tiny = 1e-9  # rounds to 0 of 65536
    operands = problem()
    state = torch.get_rng_state()
    ft.lora_linear(*operands, p=tiny)
    assert torch.equal(torch.get_rng_state(), state)
    ft.lora_linear(*operands, p=0.5)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_seed_gives_a_mask_and_another_another() -> None:
    operands = problem()
    torch.manual_seed(5)
    first = ft.lora_linear(*operands, p=0.5)
    second = ft.lora_linear(*operands, p=0.5)
    torch.manual_seed(5)
    again = ft.lora_linear(*operands, p=0.5)
    assert_exact(again, first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_replays_the_mask(use_reentrant: bool) -> None:
    x, *rest = problem()
    plain, replayed = (x.clone().requires_grad_() for _ in range(2))

    def step(t: torch.Tensor) -> torch.Tensor:
        return ft.lora_linear(t, *rest, p=0.5).square()

    torch.manual_seed(1)
    step(plain).sum().backward()
    torch.manual_seed(1)
    checkpoint(step, replayed, use_reentrant=use_reentrant).sum().backward()
    assert_exact(replayed.grad, plain.grad)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_nan_under_the_mask_does_not_leak(name: str) -> None:
    rng = torch.tensor([11, 0])
    x, _, lora_a, lora_b = problem(m=4, k=32)
    weight = torch.zeros(5, 32)
    keep = keep_mask(x.numel(), dropout_threshold(0.5), rng).view(x.shape)
    dropped = torch.where(keep, x, torch.nan)
    scaling = torch.ones(())
    with ft.backend(name):
        clean = lora_linear(x, weight, lora_a, lora_b, None, scaling, 0.5, rng, None, None, None)[1]
        poisoned = lora_linear(
            dropped, weight, lora_a, lora_b, None, scaling, 0.5, rng, None, None, None
        )[1]
    assert_exact(poisoned, clean)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_gradient_flows_where_the_mask_keeps(name: str) -> None:
    """With W = 0, dX is zero exactly under the mask of the forward."""
    rng = torch.tensor([11, 5])
    x, _, lora_a, lora_b = problem(m=9, k=21)
    x.requires_grad_()
    with ft.backend(name):
        y = ft.lora_linear(x, torch.zeros(5, 21), lora_a, lora_b, p=0.4, rng=rng)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    keep = keep_mask(x.numel(), dropout_threshold(0.4), rng).view(x.shape)
    assert torch.equal(gradient != 0, keep)


def test_saved_for_backward_is_x_xa_and_sixteen_bytes() -> None:
    m, n, k, r = 64, 48, 32, 4
    x, weight, lora_a, lora_b = (t.bfloat16() for t in problem(m, n, k, r))
    x.requires_grad_()
    for adapter in (lora_a, lora_b):
        adapter.requires_grad_()
    parameters = {t.data_ptr() for t in (weight, lora_a, lora_b)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters and tensor.dim():
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ft.lora_linear(x, weight, lora_a, lora_b, p=0.1)
    assert sorted(saved.values()) == [16, 2 * m * r, 2 * m * k]


def test_nothing_unneeded_is_saved() -> None:
    """x serves dA and dW alone, x A^T serves dB and ds alone."""
    x, weight, lora_a, lora_b = problem()
    x.requires_grad_()
    shapes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ft.lora_linear(x, weight, lora_a, lora_b)
    assert (6, 16) not in shapes
    assert (6, 4) not in shapes


def test_a_merged_weight_gives_the_same() -> None:
    x, weight, lora_a, lora_b = (t.double() for t in problem())
    merged = weight + 0.5 * lora_b @ lora_a
    adapted = ft.lora_linear(x, weight, lora_a, lora_b, scaling=0.5)
    torch.testing.assert_close(adapted, x @ merged.T)


def test_scaling_and_rows_change_without_recompilation() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x, w, a, b, s: ft.lora_linear(x, w, a, b, scaling=s, p=0.1),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    for m, s in ((6, 0.5), (7, 2.0), (9, 0.25)):
        x, *rest = problem(m)
        compiled(x, *rest, torch.tensor(s))
    assert counter.frame_count == 1
