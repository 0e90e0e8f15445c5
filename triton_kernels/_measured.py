"""What has been measured on a device, as the engines' plans read it.

A table is a JSON file, ``{device name: {"provenance": ..., "rows": [...]}}``, written by
``make gpu-tune`` and ``make cpu-tune``. A row has the sizes of a problem, the engine that was
fastest on it, and its tiles.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A measurement speaks for sizes within this factor of its own, each of them.
REACH = 2.0


@functools.cache
def read(path: Path) -> dict[str, Any]:
    """The committed measurements, by device name."""
    return json.loads(path.read_text())


def nearest(
    rows: Sequence[dict[str, Any]], problem: Any, same: Sequence[str], near: Sequence[str]
) -> dict[str, Any] | None:
    """The measurement nearest to a problem, or None where none is within reach.

    ``same`` names what has to agree, ``near`` the sizes that may differ by :data:`REACH`.
    """

    def distance(row: dict[str, Any]) -> float:
        """The largest factor between a measured size and the problem's, as a binary logarithm."""
        if any(row[name] != getattr(problem, name) for name in same):
            return math.inf
        return max(abs(math.log2(row[name] / getattr(problem, name))) for name in near)

    found = min(rows, key=distance, default=None)
    return None if found is None or distance(found) > math.log2(REACH) else found
