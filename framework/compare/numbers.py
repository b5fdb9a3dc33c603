"""Numbers and intervals as text for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from leyden.compare.intervals import Interval

MARK = "†"
"""The mark of an interval that is over the prompts of one run."""


def number(value: float) -> str:
    """A number with about three digits: 0.0123, 1.23, 123, 12.3k, 4.56M."""
    for least, unit, letter in ((9.995e8, 1e9, "G"), (9.995e5, 1e6, "M"), (9999.5, 1e3, "k")):
        if abs(value) >= least:
            return f"{_three_digits(value / unit)}{letter}"
    return _three_digits(value)


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    digits = max(0, min(4, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}".replace("-", "−") if round(value, digits) else "0"


def cells(values: Sequence[Interval | None]) -> list[str]:
    """The cells of a column, in one style: each interval as ±, or by its ends where one of them is not symmetric."""
    ends = any(value is not None and _is_lopsided(value) for value in values)
    return [cell(value, ends) for value in values]


def _is_lopsided(value: Interval) -> bool:
    return abs(value.mean - (value.low + value.high) / 2) >= 0.02 * value.half > 0


def cell(value: Interval | None, ends: bool = False) -> str:
    """A number with its interval, both rounded to two digits of the interval's half width, at most four decimals.

    Args:
        ends: write both ends of the interval, also of a symmetric one.
    """
    if value is None:
        return "–"
    if value.half <= 0:
        return number(value.mean)
    if abs(value.mean) >= 1e4:
        about = f"{number(value.low)}…{number(value.high)}" if ends else f"±{number(value.half)}"
        return f"{number(value.mean)} {about}"
    digits = max(0, min(4, 1 - math.floor(math.log10(value.half))))
    text = f"{value.mean:.{digits}f} "
    if not ends and not _is_lopsided(value):
        text += f"±{value.half:.{digits}f}"
    else:
        text += f"{value.low:.{digits}f}…{value.high:.{digits}f}"
    return text.replace("-", "−") + (MARK if value.source == "prompts" else "")


def explained(values: Iterable[Interval | None]) -> str:
    """Sentences that explain the intervals in a table."""
    intervals = [value for value in values if value is not None]
    sentences = []
    if any(value.source == "seeds" for value in intervals):
        sentences.append("± is half the 95\u00a0% interval of the mean over seeds (Student's t).")
    if any(value.source == "prompts" for value in intervals):
        sentences.append(
            f"{MARK} marks one seed: the 95\u00a0% interval is over that run's prompts, and other seeds may leave it."
        )
    if any(value.source == "" for value in intervals):
        sentences.append("A number alone is of one run, or the same in all.")
    return " ".join(sentences)
