"""Intervals by resampling of items: votes on one item depend on each other, those on different items do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 1000
"""Samples of items that an interval is made of."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; both ends are the number itself where there is no interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sums:
    """What a statistic is made of, added up over items: entry k adds `amount[k]`, of item `item[k]`, to cell `cell[k]`
    of a table of `shape`."""

    item: NDArray[np.int64]
    cell: NDArray[np.int64]
    amount: Array
    shape: tuple[int, ...]

    def total(self, weights: Array | None = None) -> Array:
        """The table, each item counted as often as `weights` say; once without them."""
        amount = self.amount if weights is None else self.amount * weights[self.item]
        size = int(np.prod(self.shape))
        counts: Array = np.bincount(self.cell, weights=amount, minlength=size).astype(np.float64)
        return counts.reshape(self.shape)


def sums(rows: list[tuple[int, int, float]], shape: tuple[int, ...]) -> Sums:
    """Sums of (item, cell, amount); amounts of one item for one cell are added up first."""
    added: dict[tuple[int, int], float] = {}
    for item, cell, amount in rows:
        added[item, cell] = added.get((item, cell), 0.0) + amount
    places = np.array(list(added), dtype=np.int64).reshape(-1, 2)
    return Sums(places[:, 0], places[:, 1], np.array(list(added.values()), dtype=np.float64), shape)


def resampled(items: int, draws: int = DRAWS, seed: int = 0) -> Iterator[Array]:
    """How often each item is in each of the samples, which are always the same for the same number of items."""
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.bincount(generator.integers(items, size=items), minlength=items).astype(np.float64)


def estimate(value: float, drawn: list[float]) -> Estimate:
    """The percentile interval (Efron 1979) of a number; samples in which it has no value are left out."""
    known = [one for one in drawn if np.isfinite(one)]
    if not known or not np.isfinite(value):
        return Estimate(value, value, value)
    low, high = np.quantile(known, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
