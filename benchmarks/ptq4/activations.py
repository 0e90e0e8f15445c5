"""4-bit weights with quantized activations, over int4_linear: figures for bars.toml."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from pyfastft import backend, functional
from pyfastft.benchmarks.measure import DTYPES, Case, medians
from pyfastft.testing.tolerance import assert_exact

GROUP = 128
# More bytes of codes than a last-level cache holds: calls rotate over copies of the weight.
_ROTATED = 48 << 20
_GATED_ROWS = 4


def quantized_activations(case: Case, device: torch.device) -> dict[str, float]:
    """How often int4_linear_a8 and int4_linear_a4 are as fast as int4_linear, forward; the case's
    shape is (M, K, N). Gated on the reference's bits, of a few rows."""
    m, k, n = case.shape
    x = torch.randn(m, k, device=device).to(DTYPES[case.dtype])
    weights = itertools.cycle([_weight(n, k, device) for _ in range(1 + _ROTATED // (n * k // 2))])
    learned: dict[str, Any] = {"x_scale": 0.2, "x_zero": 7.0}
    learned = {name: torch.full((1,), value, device=device) for name, value in learned.items()}

    def a8(x: torch.Tensor) -> torch.Tensor:
        return functional.int4_linear_a8(x, **next(weights), group_size=GROUP)

    def a4(x: torch.Tensor) -> torch.Tensor:
        return functional.int4_linear_a4(x, **next(weights), **learned, group_size=GROUP)

    one = next(weights)
    for call, more in ((functional.int4_linear_a8, {}), (functional.int4_linear_a4, learned)):
        few = call(x[:_GATED_ROWS], **one, **more, group_size=GROUP)
        with backend("reference"):
            expected = call(x[:_GATED_ROWS], **one, **more, group_size=GROUP)
        assert_exact(few, expected, call.__name__)
    times = medians(
        {
            "int4_linear": lambda: functional.int4_linear(x, **next(weights), group_size=GROUP),
            "a8": lambda: a8(x),
            "a4": lambda: a4(x),
        },
        DTYPES[case.dtype],
        device,
    )
    return {name: times["int4_linear"] / times[name] for name in ("a8", "a4")}


def _weight(n: int, k: int, device: torch.device) -> dict[str, Any]:
    codes = torch.randint(256, (n, -(-k // 2)), dtype=torch.uint8, device=device)
    scale = torch.rand(n, -(-k // GROUP), device=device) * k**-0.5
    return {"codes": codes, "scale": scale}
