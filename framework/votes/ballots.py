"""Votes beside the items that they are about: those that rank something, and a count of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from leyden.errors import UserError
from leyden.votes.vote import Item, Vote, current


@dataclass
class Ballots:
    """Current votes with their items.

    Args:
        items: those that somebody ranked, each once.
        ranked: (number in `items`, vote) of each vote that ranks two answers or more.
        skipped: votes without ranks that do not say that all answers are bad.
        all_bad: votes that say so, with ranks or without.
        gone: votes for items that are not there.
    """

    items: list[Item] = field(default_factory=list)
    ranked: list[tuple[int, Vote]] = field(default_factory=list)
    skipped: int = 0
    all_bad: int = 0
    gone: int = 0

    @property
    def people(self) -> list[str]:
        """Who ranked something, in the order of names."""
        return sorted({vote.person for _, vote in self.ranked})


def gather(items: Sequence[Item], votes: Sequence[Vote]) -> Ballots:
    """The current votes beside their items.

    Raises:
        UserError: a vote has not one rank for each answer of its item.
    """
    by_id = {item.id: item for item in items}
    ballots, numbers = Ballots(), dict[str, int]()
    for vote in current(votes):
        item = by_id.get(vote.item)
        if item is None:
            ballots.gone += 1
            continue
        check(vote, item)
        ballots.all_bad += vote.all_bad
        ballots.skipped += not vote.ranks and not vote.all_bad
        if len(vote.ranks) < 2:
            continue
        if vote.item not in numbers:
            numbers[vote.item] = len(ballots.items)
            ballots.items.append(item)
        ballots.ranked.append((numbers[vote.item], vote))
    return ballots


def check(vote: Vote, item: Item) -> None:
    """Raise `UserError` unless the vote has a rank for each answer, or none at all."""
    if vote.ranks and len(vote.ranks) != len(item.answers):
        raise UserError(
            f"vote of {vote.person} for item {vote.item}: {len(vote.ranks)} ranks for {len(item.answers)} answers; "
            "mend or remove it"
        )
