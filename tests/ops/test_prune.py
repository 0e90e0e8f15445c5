"""The prune family beyond what the registry's tests hold every op to."""

from __future__ import annotations

import pytest
import torch

import pyfastft as ft
from pyfastft import ops
from pyfastft.functional import block_sparse_linear
from pyfastft.pruning import BlockPattern
from pyfastft.testing.tolerance import assert_accurate, assert_exact

BACKENDS = ("cpu", "reference")


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest):
    with ft.backend(request.param):
        yield request.param


def pattern() -> BlockPattern:
    """Six blocks of 2 x 3 in 7 x 8, the last row of them empty."""
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    return BlockPattern.from_mask(mask, shape=(7, 8), block=(2, 3))


# The parts of its index begin at 0, 5, 11, 15, 19, 25 and 28.
HOSTILE = {
    "first-offset": (0, 1, "row offsets"),
    "last-offset": (4, 7, "row offsets"),
    "descending-offsets": (1, 4, "row offsets"),
    "negative-column": (5, -1, "within 3"),
    "column-beyond": (10, 3, "within 3"),
    "repeated-column": (6, 0, "ascend in each row"),
    "row-order": (11, 9, "follow from"),
    "column-offsets": (16, 1, "follow from"),
    "row-beyond": (19, 4, "follow from"),
    "column-order": (25, -5, "follow from"),
    "place-beyond": (28, 6, "follow from"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_refused(on: str, name: str) -> None:
    at, value, says = HOSTILE[name]
    good = pattern()
    index = good.index.clone()
    assert int(index[at]) != value
    values, x = torch.ones(6, 2, 3), torch.ones(4, 8)
    ops.block_sparse_linear(x, values, None, index, 7)  # as it is, it passes, and is remembered
    index[at] = value
    calls = (
        lambda: BlockPattern(index, shape=(7, 8), block=(2, 3)),
        lambda: ops.block_sparse_linear(x, values, None, index, 7),
        lambda: ops.block_sparse_linear_backward(
            torch.ones(4, 7), x, values, index, 8, [True, True, True]
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"expected index of .*{says}"):
            call()


def test_an_index_is_checked_again_where_its_grid_is_another(on: str) -> None:
    index = pattern().index  # of 4 x 3 blocks; 3 x 4 of them have as long an index
    values = torch.ones(6, 3, 2)
    with pytest.raises(ValueError, match="expected index of"):
        ops.block_sparse_linear(torch.ones(1, 8), values, None, index, 7)


def test_an_index_made_in_inference_mode(on: str) -> None:
    with torch.inference_mode():
        one = pattern()
        y = block_sparse_linear(torch.ones(1, 8), torch.ones(6, 2, 3), one)
    assert_exact(y, torch.tensor([[5.0, 5, 3, 3, 8, 8, 0]]))


def test_a_pattern_of_a_weight_and_back() -> None:
    weight = torch.randn(7, 8)
    weight[0:2, 3:6] = 0
    weight[6, :] = 0
    one = BlockPattern.from_weight(weight, block=(2, 3))
    assert (one.blocks, one.density) == (8, 8 / 12)
    assert one.mask().tolist() == [[1, 0, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert one.row_offsets.tolist() == [0, 2, 5, 8, 8]
    assert one.column_indices.tolist() == [0, 2, 0, 1, 2, 0, 1, 2]
    values = one.values(weight)
    assert_exact(one.dense(values), weight)
    assert not values[1, :, 2].any(), "beyond W"
    again = BlockPattern(one.index, shape=one.shape, block=one.block).to("cpu")
    assert_exact(again.index, one.index)
    assert repr(again) == "BlockPattern(8 blocks of 2 x 3 in 7 x 8)"


def test_what_is_no_pattern() -> None:
    mask = torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask of shape \(3, 3\)"):
        BlockPattern.from_mask(mask, shape=(6, 8), block=(2, 3))
    with pytest.raises(TypeError, match="mask of dtype bool"):
        BlockPattern.from_mask(mask.int(), shape=(7, 8), block=(2, 3))
    with pytest.raises(ValueError, match="block of two sizes of at least 1"):
        BlockPattern.from_mask(mask, shape=(7, 8), block=(0, 3))
    with pytest.raises(ValueError, match=r"weight of shape \(N, K\)"):
        BlockPattern.from_weight(torch.ones(3), block=(1, 1))
    with pytest.raises(ValueError, match="index of size 16 and 3 for every block"):
        BlockPattern(pattern().index[1:], shape=(7, 8), block=(2, 3))
    with pytest.raises(TypeError, match="index of dtype int32"):
        BlockPattern(pattern().index.long(), shape=(7, 8), block=(2, 3))
    with pytest.raises(ValueError, match=r"weight of shape \(7, 8\)"):
        pattern().values(torch.ones(8, 7))
    with pytest.raises(ValueError, match=r"values of shape \(6, 2, 3\)"):
        pattern().dense(torch.ones(5, 2, 3))


def test_what_does_not_fit_a_pattern() -> None:
    with pytest.raises(ValueError, match=r"x of shape \(..., 8\) to match a pattern"):
        block_sparse_linear(torch.ones(2, 7), torch.ones(6, 2, 3), pattern())
    with pytest.raises(ValueError, match=r"values of shape \(blocks, 2, 3\)"):
        block_sparse_linear(torch.ones(2, 8), torch.ones(6, 3, 2), pattern())


def test_what_lies_beyond_the_weight_is_neither_read_nor_trained(on: str) -> None:
    """Values there are NaN, and what is multiplied with them infinite."""
    torch.manual_seed(3)
    for block in ((2, 3), (16, 32)):
        one = BlockPattern.from_weight(torch.ones(7, 8), block=block)
        weight = torch.randn(7, 8)
        inside = one.values(torch.ones(7, 8)).bool()
        values = torch.where(inside, one.values(weight), torch.nan).requires_grad_()
        for tokens in (1, 9):
            x = torch.randn(tokens, 8).requires_grad_()
            grad = torch.randn(tokens, 7)
            grad[0, 0] = x.data[0, 0] = torch.inf
            y = block_sparse_linear(x, values, one)
            truth = (x.double() @ weight.double().T).detach()
            assert_accurate(y.detach(), truth, x.detach() @ weight.T)
            dx, dvalues = torch.autograd.grad(y, (x, values), grad)
            assert_accurate(dx, grad.double() @ weight.double(), grad @ weight, gradient=True)
            dense = grad.double().T @ x.detach().double()
            naive = one.values(grad.T @ x.detach())
            assert_accurate(dvalues, one.values(dense), naive, gradient=True)
            assert not dvalues[~inside].any()


def test_gradients_are_those_of_the_dense_weight_at_the_blocks(on: str) -> None:
    one, x = pattern(), torch.randn(2, 5, 8)
    values, bias = torch.randn(6, 2, 3), torch.randn(7)

    def gradients(dtype: torch.dtype, dense: bool) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, values, bias)]
        if dense:
            y = torch.nn.functional.linear(leaves[0], one.dense(leaves[1]), leaves[2])
        else:
            y = block_sparse_linear(leaves[0], leaves[1], one, bias=leaves[2])
        return torch.autograd.grad(y.square().sum(), leaves)

    ours, truth, naive = (
        gradients(torch.float32, False),
        gradients(torch.float64, True),
        gradients(torch.float32, True),
    )
    for a, t, n in zip(ours, truth, naive, strict=True):
        assert_accurate(a, t, n, gradient=True)


def test_a_layer_trains_its_blocks(on: str) -> None:
    """A target that has the same blocks is found by gradient descent."""
    torch.manual_seed(0)
    one = pattern()
    target = one.dense(torch.randn(6, 2, 3))
    values = torch.zeros(6, 2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=0.3)
    x = torch.randn(32, 8)
    losses = []
    for _ in range(60):
        loss = (block_sparse_linear(x, values, one) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-2 * losses[0]
