"""Why a row is not used, in full for the row and in a few words for summaries."""

from __future__ import annotations

from collections.abc import Mapping


class RowError(ValueError):
    """A row that cannot be used. The message says `what is wrong; what to do`; the caller adds where the row stands.

    `reason` is the same in a few words, without the row's own: what summaries count by.
    """

    def __init__(self, message: str, reason: str = "bad") -> None:
        super().__init__(message)
        self.reason = reason


class LeftOut(Exception):
    """A good row that an option leaves out. The message is the reason that summaries count by."""


def by_count(reasons: Mapping[str, int]) -> str:
    """`12 chosen equals rejected, 3 too long`: the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered)
