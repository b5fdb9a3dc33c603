"""One seed for a run: what is given none of its own follows `--seed_everything`."""

from __future__ import annotations

import os

MEASURED = 0
"""Of all that is drawn to measure on: the same for every run, or runs could not be compared."""


def chosen(seed: int | None) -> int:
    """A seed, or where there is none that of Lightning's `seed_everything`; 0 where nothing was seeded."""
    return seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED") or 0)
