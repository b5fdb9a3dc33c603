"""Axes of a chart: from numbers to pixels, and round numbers for the ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

UNITS = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
"""Units of large numbers: the least number that takes one, its divisor, and its letter."""


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, which lie `start` and `end` pixels from the corner. `root`: the scale is by square
    roots, which gives small numbers more room."""

    low: float
    high: float
    start: float
    end: float
    root: bool = False

    def place(self, value: float) -> float:
        """Pixels from the corner; a value outside of `low` to `high` lies outside of the axis."""
        low, high, value = (_root(v) if self.root else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, apart: float = 56) -> list[float]:
        """Round numbers on the axis, at least `apart` pixels from each other."""
        length = abs(self.end - self.start)
        if not self.root:
            step = round_step((self.high - self.low) / max(1, length / apart))
            first = math.ceil(self.low / step - 1e-9)
            return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        ticks = [self.low]  # by square roots: each number as far from the one before as labels need
        for value in _round_numbers(self.high):
            if abs(self.place(value) - self.place(ticks[-1])) >= apart:
                ticks.append(value)
        return ticks


def fitted(values: Sequence[float], start: float, end: float, zero: bool = False, root: bool = False) -> Axis:
    """An axis on which all values lie, with a little room at both ends; `zero`: it begins at 0 unless some are less."""
    low, high = min(values), max(values)
    if root or (zero and low >= 0):
        return Axis(0.0, max(high * 1.06, 1e-6), start, end, root)
    margin = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - margin, high + margin, start, end)


def written(ticks: Sequence[float]) -> list[str]:
    """Ticks of an axis as text, all with as many digits as the finest needs."""
    most = max(map(abs, ticks), default=0.0)
    unit, letter = next(((u, name) for least, u, name in UNITS if most >= least), (1.0, ""))
    spacing = min((b - a for a, b in pairwise(ticks)), default=1.0) / unit
    digits = max(0, -math.floor(math.log10(spacing) + 1e-9))
    even = len({round(b - a, 9) for a, b in pairwise(ticks)}) < 2
    texts = [f"{value / unit:.{digits}f}" if even else f"{value / unit:g}" for value in ticks]
    return [f"{text}{letter}".replace("-", "−") if float(text) else "0" for text in texts]


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20 … times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _round_numbers(high: float) -> list[float]:
    """1, 2, 5, 10 … from a thousandth of `high` up to it."""
    first = math.floor(math.log10(high)) - 3
    numbers = (factor * 10.0**power for power in range(first, first + 5) for factor in (1, 2, 5))
    return [number for number in numbers if number <= high]


def _root(value: float) -> float:
    return math.sqrt(max(value, 0.0))
