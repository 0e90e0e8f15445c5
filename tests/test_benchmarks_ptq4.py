"""The benchmark of 4-bit weights where a peer is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyfastft.benchmarks import bars
from pyfastft.benchmarks.ptq4 import weight_only
from pyfastft.benchmarks.ptq4.layer import Weight

CPU = torch.device("cpu")


def test_without_bitsandbytes_its_bars_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others of the same figure are."""
    hidden = "bitsandbytes is not installed"
    monkeypatch.setattr(weight_only, "why_no_bitsandbytes", lambda: hidden)
    monkeypatch.setattr(weight_only, "_ROWS", (2,))
    monkeypatch.setattr(weight_only, "rotated", lambda n, k: [Weight.draw(64, 128)])
    taken = []

    def times(steps: dict[str, list[Any]], **_: Any) -> tuple[dict[str, float], float]:
        for calls in steps.values():
            taken.append(calls[0]())
        return dict.fromkeys(steps, 1.0), 1.0

    monkeypatch.setattr(weight_only, "times", times)
    found = weight_only.forward()
    assert found == {
        "M=2 over aten int4": 1.0,
        "M=2 over bf16": 1.0,
        "M=2 nf4 beside int4": 1.0,
        "M=2 over bitsandbytes nf4": hidden,
    }
    assert {y.shape for y in taken} == {(2, 64)}
    for bar in bars.load():
        if bar.figure in ("input_gradient", "qlora"):
            finding = bars.judge(bar, bars.Session(CPU).record(bar))
            assert (finding.verdict, finding.why) == ("not measured", hidden)
