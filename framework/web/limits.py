"""Limits of how often someone may ask: a bucket of tokens for each, which fills up again with time."""

from __future__ import annotations

import time
from collections.abc import Callable

KEPT = 10_000
"""Buckets that are kept; those that are full again go first."""


class Limit:
    """At most `burst` requests at once, and `rate` a second in the long run, of each who asks.

    Args:
        rate: requests a second.
        burst: requests at once.
        clock: seconds that only grow.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self.clock = rate, burst, clock
        self._left: dict[str, tuple[float, float]] = {}

    def allows(self, who: str) -> bool:
        """Count one request of someone; whether it may be answered."""
        now = self.clock()
        left = self._now(who, now)
        if len(self._left) >= KEPT and who not in self._left:
            self._left = {name: kept for name, kept in self._left.items() if self._now(name, now) < self.burst}
            if len(self._left) >= KEPT:  # a crowd of strangers: whoever asked longest ago is forgotten
                del self._left[next(iter(self._left))]
        self._left[who] = (max(left - 1, 0.0), now)
        return left >= 1

    def _now(self, who: str, now: float) -> float:
        left, since = self._left.get(who, (float(self.burst), now))
        return min(float(self.burst), left + (now - since) * self.rate)
