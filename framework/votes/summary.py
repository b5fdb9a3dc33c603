"""What people's votes come to, in numbers and in sentences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from leyden.votes.agreement import Agreement, agreement
from leyden.votes.ballots import Ballots, gather
from leyden.votes.bootstrap import Estimate
from leyden.votes.bradley_terry import Scores, bradley_terry
from leyden.votes.reward_agreement import RewardAgreement, reward_agreement
from leyden.votes.vote import Item, Vote, current


@dataclass(frozen=True)
class Person:
    """One person: how many items they voted on, skipped and called all bad, and of the pairs of answers that they share
    with others the part in which both said the same; NaN where they share none."""

    name: str
    votes: int
    skipped: int
    all_bad: int
    pairs: int
    share: float


@dataclass(frozen=True)
class Summary:
    """Everything that a report shows."""

    items: int
    votes: list[Vote]
    ballots: Ballots
    people: list[Person]
    agreement: Agreement
    scores: Scores
    reward: RewardAgreement | None


def summary(items: Sequence[Item], votes: Sequence[Vote]) -> Summary:
    """Count, score and compare. Raises `UserError` where a vote does not fit its item."""
    agreed = agreement(items, votes)
    return Summary(
        len({item.id for item in items}), current(votes), gather(items, votes), _people(votes, agreed), agreed,
        bradley_terry(items, votes), reward_agreement(items, votes),
    )  # fmt: skip


def _people(votes: Sequence[Vote], agreed: Agreement) -> list[Person]:
    counts: dict[str, Counter[str]] = {vote.person: Counter() for vote in sorted(votes, key=lambda vote: vote.person)}
    for vote in current(votes):
        kind = "all bad" if vote.all_bad else "" if vote.ranks else "skipped"
        counts[vote.person].update(["votes", kind])
    for two in agreed.two:
        for name in two.people:
            counts[name].update(pairs=two.pairs, same=round(two.share * two.pairs))
    return [
        Person(name, n["votes"], n["skipped"], n["all bad"], n["pairs"],
               n["same"] / n["pairs"] if n["pairs"] else math.nan)
        for name, n in counts.items()
    ]  # fmt: skip


def counted(votes: Summary) -> list[str]:
    """How much was said, and how much of it orders nothing."""
    ballots = votes.ballots
    text = (
        f"{len(votes.votes):,} votes of {len(votes.people)} people on {len({vote.item for vote in votes.votes}):,} of "
        f"{votes.items:,} items"
    )
    rest = {
        f"{ballots.skipped:,} votes skip their item": ballots.skipped,
        f"{ballots.all_bad:,} votes call all answers bad": ballots.all_bad,
        f"{ballots.gone:,} votes are for items that are gone": ballots.gone,
    }
    return [text, *(said for said, count in rest.items() if count)]


def conclusion(scores: Scores) -> list[str]:
    """Which model is best as far as the votes can tell: a model is better than another where the 95 % interval of the
    difference of their scores is above 0."""
    if len(scores.models) < 2:
        return ["No vote compares two models, so none has a score."]
    behind, undecided = list[str](), list[str]()
    for at in range(1, len(scores.models)):
        (behind if scores.difference(0, at).low > 0 else undecided).append(scores.models[at])
    said = [f"People find {scores.models[0]} better than {', '.join(behind)}."] if behind else []
    if undecided:
        said.append(f"Whether {scores.models[0]} is better than {', '.join(undecided)}, the votes leave open.")
    return said


def beyond_chance(value: float) -> str:
    """What an alpha is good for, by the bounds that Krippendorff (2004, section 11.4.2) gives."""
    if math.isnan(value):
        return "no two people ranked the same item"
    if value >= 0.8:
        return "reliable votes"
    return "enough for tentative conclusions" if value >= 0.667 else "too little to rely on a single person"


def shown(value: Estimate, digits: int = 2, percent: bool = False) -> str:
    """A number with its interval: `0.46 (0.33 to 0.59)`; a dash where there is none."""
    if math.isnan(value.value):
        return "–"
    texts = [_number(one, digits, percent) for one in (value.value, value.low, value.high)]
    return texts[0] if value.low == value.high else f"{texts[0]} ({texts[1]}…{texts[2]})"


def percent(value: float) -> str:
    """A share as text; a dash where it is not known."""
    return "–" if math.isnan(value) else _number(value, 2, True)


def _number(value: float, digits: int, as_percent: bool) -> str:
    text = f"{100 * value:.0f}%" if as_percent else f"{value:.{digits}f}"
    return text.replace("-", "−") if text.strip("-0.%") else text.replace("-", "")
