"""What a call did to a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Report:
    """What was changed, what was skipped and why, and how many parameters train now.

    Attributes:
        action: what was done, e.g. ``"convert"``.
        changed: names of the modules that were changed.
        skipped: names of the modules that were asked for and left alone, with the reasons.
        trainable: number of parameters that require a gradient.
        total: number of all parameters.
    """

    action: str
    changed: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict, hash=False)
    trainable: int = 0
    total: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many modules were changed, by the last part of their names."""
        return dict(Counter(map(leaf, self.changed)).most_common())

    def __str__(self) -> str:
        share = f"{100 * self.trainable / self.total:.3g} %" if self.total else "none"
        lines = [
            f"{self.action}: {len(self.changed)} changed, {len(self.skipped)} skipped; "
            f"{self.trainable:,} of {self.total:,} parameters train ({share})"
        ]
        if self.changed:
            lines.append("  changed: " + ", ".join(f"{n} x {c}" for n, c in self.counts.items()))
        for reason, number in Counter(self.skipped.values()).most_common():
            names = [name for name, why in self.skipped.items() if why == reason]
            more = f" and {number - 3} more" if number > 3 else ""
            lines.append(f"  skipped {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)


def leaf(name: str) -> str:
    """The last part of a module's name that is no number."""
    parts = name.split(".")
    return next((part for part in reversed(parts) if not part.isdigit()), parts[-1])


def report(
    action: str, model: nn.Module, changed: Iterable[str], skipped: Mapping[str, str] | None = None
) -> Report:
    """The Report of an action on this model, its parameters counted."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Report(
        action,
        tuple(changed),
        dict(skipped or {}),
        trainable=sum(n for n, trains in sizes if trains),
        total=sum(n for n, _ in sizes),
    )
