"""One sentence on what a comparison allows to be said: which groups are apart by the first column, and no more."""

from __future__ import annotations

from collections.abc import Sequence

from leyden.compare.comparison import Comparison
from leyden.compare.intervals import Interval


def conclusion(comparison: Comparison) -> str:
    """The sentence; empty where there are no two groups to compare.

    Two groups are apart where their 95 % intervals do not meet, which is a stricter test than one of the difference.
    Intervals that meet show nothing: neither that two groups differ nor that they are equal.
    """
    if not comparison.columns:
        return ""
    column = comparison.columns[0]
    named = [(group.name, comparison.value(group, column.column)) for group in comparison.groups]
    values = [(name, value) for name, value in named if value is not None]
    if len(values) < 2:
        return ""
    (first, best), rest = values[0], values[1:]
    if any(not value.source for _, value in values):
        return f"By {column.name} alone nothing can be concluded: not all of these numbers have an interval."
    behind = [name for name, value in rest if not _meet(best, value)]
    open_ = [name for name, value in rest if _meet(best, value)]
    seeds = " and for these seeds" if any(value.source == "prompts" for _, value in values) else ""
    found = [f"{first} is better than {_listed(behind, 'and')}"] if behind else []
    unknown = [f"whether {first} or {_listed(open_, 'or')} is better, the intervals leave open"] if open_ else []
    return f"By {column.name}{seeds}, {'; '.join(found + unknown)}."


def _meet(one: Interval, other: Interval) -> bool:
    return one.low <= other.high and other.low <= one.high


def _listed(names: Sequence[str], last: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
