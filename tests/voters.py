"""Simulated people whose strengths, ties and errors are known, and the items that they vote on."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from leyden.votes import Answer, Item, Vote

PEOPLE = [f"person {number}" for number in range(20)]


def item(number: int, models: Sequence[str], scores: Sequence[float] | None = None) -> Item:
    """A question of its own with an answer by each model."""
    answers = [
        Answer(f"answer {at} of {name} to {number}", name, scores and scores[at]) for at, name in enumerate(models)
    ]
    return Item(({"role": "user", "content": f"question {number}"},), tuple(answers))


def vote(of: Item, person: str, *ranks: int, time: float = 0.0, **options: object) -> Vote:
    return Vote(of.id, person, time, ranks, **options)  # type: ignore[arg-type]


def ranks_of(worth: Sequence[float]) -> tuple[int, ...]:
    """1 for the most."""
    return tuple(1 + sum(other > mine for other in worth) for mine in worth)


def plackett_luce(r: random.Random, items: int, strengths: dict[str, float], each: int = 3, shown: int = 3) -> tuple:
    """Items of some of the models, each ranked by `each` of the people. Of a Plackett-Luce ranking every pair is a
    comparison by Bradley and Terry: Gumbel noise on the strengths orders the answers."""
    found, votes = [], []
    for number in range(items):
        models = r.sample(sorted(strengths), shown)
        found.append(item(number, models))
        for person in r.sample(PEOPLE, each):
            worth = [strengths[name] - math.log(-math.log(r.random())) for name in models]
            votes.append(vote(found[-1], person, *ranks_of(worth)))
    return found, votes


def davidson(r: random.Random, items: int, strengths: dict[str, float], nu: float, each: int = 3) -> tuple:
    """Pairs of answers, ranked with ties as Davidson's model has it."""
    found, votes = [], []
    for number in range(items):
        models = r.sample(sorted(strengths), 2)
        found.append(item(number, models))
        a, b = (math.exp(strengths[name]) for name in models)
        for person in r.sample(PEOPLE, each):
            said = r.choices([(1, 2), (2, 1), (1, 1)], [a, b, nu * math.sqrt(a * b)])[0]
            votes.append(vote(found[-1], person, *said))
    return found, votes


def erring(r: random.Random, items: int, errors: dict[str, float], each: int = 4) -> tuple:
    """Pairs of answers of which one is better; each person says the contrary with a probability of their own."""
    found, votes = [], []
    for number in range(items):
        found.append(item(number, ("one", "other")))
        better = r.choice([(1, 2), (2, 1)])
        for person in r.sample(sorted(errors), each):
            votes.append(vote(found[-1], person, *(better[::-1] if r.random() < errors[person] else better)))
    return found, votes
