"""What the subcommands of the command line share."""

from __future__ import annotations

from collections.abc import Sequence


class UsageError(Exception):
    """The call, its input or its environment is wrong; the message is for the user. Exit code 2."""


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows as aligned text, indented by two and two spaces apart; ``right`` aligns to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  "
        + "  ".join(
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
