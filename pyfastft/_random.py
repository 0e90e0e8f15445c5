"""Counter-based dropout: what is fixed once for every backend.

The mask of a matrix x of shape (M, K) is a function of the element's linear index
``i = row * K + column`` and of an int64 tensor ``rng = (seed, offset)``:

    words  = Philox4x32-10(key = seed, counter = (i // 8, offset))      four 32-bit words
    draw   = half (i % 8) of the words                                  low half first, 16 bits
    keep   = draw >= t,   t = round(65536 p)
    x_hat  = x * 65536 / (65536 - t) where keep, else 0

seed, i // 8 and offset are 64-bit, the low word first. Dropped elements are selected away, not
multiplied by zero: a NaN under the mask does not leak. The scale belongs to the threshold, not to
p, so the expectation of x_hat is x exactly. Projections that share one ``rng`` differ in their
key: projection j draws with ``seed + j``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.
"""

from __future__ import annotations

import torch

GROUP = 8  # elements that share one call of Philox


def dropout_threshold(p: float) -> int:
    """t of 65536: how many of the 16-bit draws are dropped."""
    return round(65536 * p)


def dropout_scale(threshold: int) -> float:
    """What a kept element is multiplied by; 0 where nothing is kept."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def draw_rng(device: torch.device) -> torch.Tensor:
    """A fresh (seed, offset) from torch's generator of the device, as an int64 tensor there.

    Drawn by an operator of torch's, so it follows ``torch.manual_seed``, is replayed by activation
    checkpointing, and differs from replay to replay of a CUDA graph.
    """
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)
