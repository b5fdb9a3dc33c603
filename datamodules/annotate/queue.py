"""What to ask next: each person sees an item once, and two people get different ones while there are enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from leyden.datamodules.annotate.store import Store
from leyden.errors import UserError

ORDERS = {"least": "votes, place", "disagreement": "spread DESC, votes, place"}
"""Name of an order -> how the items stand in it: the least voted first, or where an ensemble disagrees most."""
HELD = 900.0
"""Seconds for which an item is kept for a person who says nothing."""


class Queue:
    """Items in an order, of which each person gets one after the other.

    Args:
        store: of the items.
        order: a name of `ORDERS`.
        enough: votes of different people after which an item is not asked any more; None asks everyone.
        clock: seconds that only grow.

    Raises:
        UserError: they are to stand by disagreement, and no item has a spread.
    """

    def __init__(
        self, store: Store, order: str = "least", enough: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if order == "disagreement" and store.first("SELECT place FROM items WHERE spread > 0") is None:
            raise UserError(
                "--order disagreement: no answer has a spread; give rollouts of a run with --model.reward Ensemble"
            )
        self.store, self.enough, self.clock = store, 1 << 30 if enough is None else enough, clock
        self._order = ORDERS[order]
        self._held: dict[str, tuple[int, float]] = {}
        """Person -> the item that they have, and when they were last heard of."""
        self._lock = Lock()

    def next(self, person: str) -> int | None:
        """The place of the item that a person is asked now: what they have, else the first open one that nobody else
        has, else one that somebody has, else one that they skipped; None where they are through."""
        with self._lock:
            now = self.clock()
            self._held = {who: held for who, held in self._held.items() if now - held[1] < HELD}
            place = self._own(person)
            if place is None:
                others = [place for who, (place, _) in self._held.items() if who != person]
                place = self._open(person, others) or self._open(person, ()) or self._skipped(person)
            if place is None:
                self._held.pop(person, None)
            else:
                self._held[person] = (place, now)
            return place

    def release(self, person: str) -> None:
        """A person has said something of the item that they had."""
        with self._lock:
            self._held.pop(person, None)

    def _own(self, person: str) -> int | None:
        place = self._held.get(person, (None, 0.0))[0]
        known = place and self.store.first("SELECT skipped FROM answered WHERE person = ? AND item = ?", person, place)
        return None if known and not known[0] else place

    def _open(self, person: str, others: list[int] | tuple[()]) -> int | None:
        query = (
            "SELECT place FROM items WHERE votes < ? "
            "AND NOT EXISTS (SELECT 1 FROM answered WHERE person = ? AND item = place) "
        )
        row = self.store.first(f"{query} ORDER BY {self._order}", self.enough, person, unless=others)
        return None if row is None else int(row[0])

    def _skipped(self, person: str) -> int | None:
        row = self.store.first(
            "SELECT item FROM answered JOIN items ON place = item WHERE person = ? AND skipped AND votes < ? "
            "ORDER BY number LIMIT 1",
            person,
            self.enough,
        )
        return None if row is None else int(row[0])
