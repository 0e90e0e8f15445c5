"""The dropout mask of :mod:`pyfastft._random` in integer arithmetic of PyTorch's."""

from __future__ import annotations

import torch

from pyfastft._random import GROUP, dropout_scale, dropout_threshold

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    key: torch.Tensor, counter: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox on 64-bit key, counter (any shape) and offset; four 32-bit words.

    All are int64; a product of two 32-bit words wraps there, which leaves its 64 bits right.
    """
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = (offset & _MASK).expand_as(c0)
    c3 = ((offset >> 32) & _MASK).expand_as(c0)
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK) ^ c1 ^ k0,
            high & _MASK,
            ((low >> 32) & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def keep_mask(elements: int, threshold: int, rng: torch.Tensor) -> torch.Tensor:
    """Which of the first ``elements`` linear indices are kept; bool, on rng's device."""
    groups = torch.arange(-(-elements // GROUP), device=rng.device)
    words = torch.stack(philox4x32(rng[0], groups, rng[1]), dim=-1)
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return (draws >= threshold).reshape(-1)[:elements]


def dropout(x: torch.Tensor, p: float, rng: torch.Tensor | None) -> torch.Tensor:
    """x_hat of :mod:`pyfastft._random` for x of shape (M, K)."""
    threshold = dropout_threshold(p)
    if threshold == 0 or rng is None:
        return x
    keep = keep_mask(x.numel(), threshold, rng).view(x.shape)
    return torch.where(keep, x * dropout_scale(threshold), 0)
