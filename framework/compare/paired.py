"""Differences of groups on the same questions of a benchmark: far narrower than the intervals of each alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from leyden.compare.benchmarks import PREFIX
from leyden.compare.comparison import Comparison
from leyden.compare.groups import SeedGroup
from leyden.compare.influence import standard_error
from leyden.compare.numbers import number


@dataclass(frozen=True)
class Difference:
    """By how much the best group leads another by a column, with the 95 % interval over the questions."""

    column: str
    best: str
    other: str
    by: float
    """The best's measure less the other's"""
    half: float
    """Half the interval's width"""
    questions: int
    seeds: bool
    """Whether a group has several runs, for which alone the interval speaks"""

    def __str__(self) -> str:
        if self.by == self.half == 0:
            return f"{self.column}: {self.best} and {self.other} do not differ on any of {self.questions:,} questions"
        low, high = number(self.by - self.half), number(self.by + self.half)
        found = "" if abs(self.by) > self.half else ", which leaves open which is better"
        seeds = " and for these seeds" if self.seeds else ""
        return (
            f"{self.column}: {self.best} less {self.other} is {number(self.by)} ({low} to {high}) on the same "
            f"{self.questions:,} questions{seeds}{found}"
        )


def differences(comparison: Comparison) -> list[Difference]:
    """Of each column of a benchmark: the best group against each other one that was asked alike."""
    found = []
    for column in comparison.columns:
        if not column.column.startswith(PREFIX):
            continue
        values = [(value.mean, g) for g in comparison.groups if (value := comparison.value(g, column.column))]
        ordered = sorted(values, key=lambda pair: pair[0] if column.best == "least" else -pair[0])
        for other in ordered[1:]:
            one = _difference(comparison, column.column, ordered[0], other)
            found += [one] if one is not None else []
    return found


def _difference(
    comparison: Comparison, column: str, best: tuple[float, SeedGroup], other: tuple[float, SeedGroup]
) -> Difference | None:
    (mine, a), (theirs, b) = best, other
    first, second = _influences(comparison, a, column), _influences(comparison, b, column)
    if not first or [len(part) for _, part in first] != [len(part) for _, part in second]:
        return None
    variance = sum(
        (weight * standard_error([x - y for x, y in zip(one, two, strict=True)])) ** 2
        for (weight, one), (_, two) in zip(first, second, strict=True)
    )
    half = NormalDist().inv_cdf(0.975) * math.sqrt(variance)
    seeds = any(len(comparison.members(group, column)) > 1 for group in (a, b))
    return Difference(column, a.name, b.name, mine - theirs, half, sum(len(part) for _, part in first), seeds)


def _influences(comparison: Comparison, group: SeedGroup, column: str) -> list[tuple[float, list[float]]]:
    """(weight, influence of each question) of a group's measure, the mean over its runs; empty where one has none."""
    parts: list[Sequence[tuple[float, Sequence[float]]]] = [
        run.benchmarks[column].parts for run in comparison.members(group, column) if column in run.benchmarks
    ]
    if not parts or any(not one for one in parts):
        return []
    return [
        (same[0][0], [fmean(values) for values in zip(*(influence for _, influence in same), strict=True)])
        for same in zip(*parts, strict=True)
    ]
