"""Means with 95 % confidence intervals, over seeds or over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev
from typing import Literal

Source = Literal["seeds", "prompts", ""]


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % confidence interval, both in the measure's own unit.

    `source` says what the interval is over: `seeds` (runs that differ in nothing else), `prompts` (those of one run's
    evaluation), or nothing, where there is no interval: then `low` and `high` are the number itself.
    """

    mean: float
    low: float
    high: float
    source: Source = ""
    count: int = 1
    """Runs that the mean is over."""

    @property
    def half(self) -> float:
        """Half the interval's width; 0 where there is none."""
        return (self.high - self.low) / 2


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean of two or more runs with Student's interval: mean ± t(0.975, n - 1) · s / √n."""
    mean, count = fmean(values), len(values)
    half = t_quantile(count - 1) * stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, "seeds", count)


def over_prompts(mean: float, error: float) -> Interval:
    """The mean over a run's prompts with the normal interval of its standard error."""
    half = NormalDist().inv_cdf(0.975) * error
    return Interval(mean, mean - half, mean + half, "prompts")


def share_within(within: float, freedom: int) -> float:
    """P(|T| <= `within`) for Student's t with `freedom` degrees of freedom.

    Abramowitz and Stegun 26.7.3 and 26.7.4: finite sums for whole degrees of freedom.
    """
    angle = math.atan(within / math.sqrt(freedom))
    sine, cosine, odd = math.sin(angle), math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@lru_cache
def t_quantile(freedom: int) -> float:
    """The 97.5 % point of Student's t, by bisection to 1e-9: 12.706 for one degree of freedom, 1.960 for many."""
    low, high = 1.0, 13.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if share_within(middle, freedom) < 0.95 else (low, middle)
    return low
