"""What people are asked and what they say: an item with its answers, and a vote."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from leyden.errors import UserError


@dataclass(frozen=True)
class Answer:
    """One of the answers that are ranked. People see its text alone."""

    text: str
    """What is shown."""
    model: str = ""
    """Who wrote it: the name of a run, or of a file."""
    score: float | None = None
    """What a reward gave it."""
    spread: float | None = None
    """Standard deviation of that over the members of an ensemble."""


@dataclass(frozen=True)
class Item:
    """A question and 2 to 8 answers to it."""

    messages: tuple[Mapping[str, Any], ...]
    """The conversation before the answers, `role` and `content` each."""
    answers: tuple[Answer, ...]
    """In the order that ranks refer to; people see them in another."""

    @property
    def id(self) -> str:
        """16 hex digits that depend on the question and on the set of answers, not on their order or scores."""
        asked = [(str(message.get("role")), str(message.get("content"))) for message in self.messages]
        told = repr((asked, sorted((answer.text, answer.model) for answer in self.answers)))
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Vote:
    """What one person said of one item. A later vote of the same person for the same item replaces it."""

    item: str
    """`Item.id`."""
    person: str
    """Who voted, by the name that the link was made for."""
    time: float
    """Seconds since 1970."""
    ranks: tuple[int, ...] = ()
    """A rank for each answer in the item's order: 1 is the best, equal ranks are a tie. Empty where it was skipped."""
    all_bad: bool = False
    """None of the answers is good; `ranks` may still order them."""
    reason: str = ""
    """What the person wrote about it; empty for nothing."""

    def __post_init__(self) -> None:
        if self.ranks and (min(self.ranks) != 1 or any(type(rank) is not int for rank in self.ranks)):
            raise UserError(f"ranks {list(self.ranks)}: give whole numbers for the answers, from 1 for the best")

    def pairs(self) -> Iterator[tuple[int, int, bool]]:
        """(i, j, tie) of all pairs of answers, by their place in the item: i is better than j, or they are a tie."""
        for i, j in combinations(range(len(self.ranks)), 2):
            better, worse = (i, j) if self.ranks[i] <= self.ranks[j] else (j, i)
            yield better, worse, self.ranks[i] == self.ranks[j]


def current(votes: Sequence[Vote]) -> list[Vote]:
    """The last vote of each person for each item, in the order of time."""
    last = {(vote.item, vote.person): vote for vote in sorted(votes, key=lambda vote: vote.time)}
    return sorted(last.values(), key=lambda vote: vote.time)
