"""The tolerance policy: the only place in the project where a numeric tolerance is written.

*Exact*: codes, masks, indices, round trips; ``torch.equal`` with NaNs in the same places.

*Accurate*: an op's error against the float64 reference may be at most twice (for a gradient three
times) that of the naive expression in PyTorch in the same dtype, plus one rounding of the output's
dtype. It depends on neither shape nor dtype. Source: the rule of flash-attention's tests.
"""

from __future__ import annotations

import torch

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def assert_exact(actual: torch.Tensor, expected: torch.Tensor, what: str = "tensor") -> None:
    """Same dtype, shape and bits; NaNs may differ in their payload."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    same = actual == expected
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    wrong = int((~same).sum())
    assert wrong == 0, f"{what}: {wrong} of {same.numel()} elements differ"


def error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest absolute difference over the elements where the truth is finite."""
    finite = truth.isfinite()
    if not bool(finite.any()):
        return 0.0
    return float((actual.detach().double() - truth.detach().double())[finite].abs().max())


def accuracy_bound(truth: torch.Tensor, naive: torch.Tensor, *, gradient: bool = False) -> float:
    """How large an op's error may be, given the truth and the naive result in the op's dtype."""
    factor = GRADIENT_FACTOR if gradient else FORWARD_FACTOR
    finite = truth.detach()[truth.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return factor * error(naive, truth) + torch.finfo(naive.dtype).eps * largest


def assert_accurate(
    actual: torch.Tensor,
    truth: torch.Tensor,
    naive: torch.Tensor,
    gradient: bool = False,
    what: str = "output",
) -> None:
    """Hold an op's output to the policy.

    Args:
        actual: the op's output.
        truth: the float64 reference's, on the same inputs.
        naive: the plain PyTorch expression's, in the op's dtype.
        gradient: whether this is a gradient, which is allowed a larger factor.
        what: the name that a failure gives it.
    """
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape} is not {truth.shape}"
    assert actual.dtype == naive.dtype, f"{what}: {actual.dtype} is not {naive.dtype}"
    misplaced = int((actual.isnan() != truth.isnan()).sum())
    assert misplaced == 0, f"{what}: {misplaced} elements are NaN in one of result and truth only"
    if actual.numel() == 0:
        return
    infinite = truth.isinf()
    if bool(infinite.any()):
        assert_exact(actual[infinite].double(), truth[infinite], f"{what} where it is infinite")
    bound = accuracy_bound(truth, naive, gradient=gradient)
    found = error(actual, truth)
    assert found <= bound, f"{what}: error {found:.3e} exceeds the bound {bound:.3e}"
