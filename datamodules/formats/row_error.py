"""Exceptions for rows that are not used, in full for the row and as a short reason for summaries."""

from __future__ import annotations

from collections.abc import Mapping

from leyden.errors import RowError

__all__ = ["LeftOut", "RowError", "by_count"]


class LeftOut(Exception):
    """A good row that an option leaves out. The message is the reason that summaries count by."""


def by_count(reasons: Mapping[str, int]) -> str:
    """`12 chosen equals rejected, 3 too long`: the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered)
