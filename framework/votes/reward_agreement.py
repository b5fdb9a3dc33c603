"""How far people and the reward that scored the same answers order them alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from leyden.votes.ballots import gather
from leyden.votes.bootstrap import DRAWS, Array, Estimate, estimate, resampled, sums
from leyden.votes.vote import Item, Vote

ALIKE, AGAINST, PEOPLE_TIE, REWARD_TIES, BOTH_TIE = range(5)


@dataclass(frozen=True)
class RewardAgreement:
    """People beside the reward, over pairs of answers that have scores and each person's vote on them.

    Args:
        share: of the pairs that the person orders, how many the reward orders alike; where it scores both the same,
            that is half a pair.
        tau_b: Kendall's rank correlation over all pairs, see `tau_b`.
        pairs: how many the person orders.
        ties: how many the person calls a tie; `share` leaves them out.
    """

    share: Estimate
    tau_b: Estimate
    pairs: int
    ties: int


def reward_agreement(
    items: Sequence[Item], votes: Sequence[Vote], model: str | None = None, draws: int = DRAWS
) -> RewardAgreement | None:
    """Agreement of people with the scores of answers, with intervals over items; None where no pair has two scores.

    Args:
        items: with scores of their answers. Those of one item must be of one reward.
        votes: on them.
        model: only pairs with an answer of this model.
    """
    ballots = gather(items, votes)
    rows = []
    for number, vote in ballots.ranked:
        answers = ballots.items[number].answers
        for i, j, tie in vote.pairs():
            better, worse = answers[i].score, answers[j].score
            known = better is not None and worse is not None and math.isfinite(better) and math.isfinite(worse)
            if not known or (model is not None and model not in (answers[i].model, answers[j].model)):
                continue
            if tie:
                cell = BOTH_TIE if better == worse else PEOPLE_TIE
            else:
                cell = REWARD_TIES if better == worse else ALIKE if better > worse else AGAINST  # type: ignore[operator]
            rows.append((number, cell, 1.0))
    if not rows:
        return None
    table = sums(rows, (5,))
    drawn = [table.total(weights) for weights in resampled(len(ballots.items), draws)]
    total = table.total()
    return RewardAgreement(
        estimate(share(total), [share(one) for one in drawn]),
        estimate(tau_b(total), [tau_b(one) for one in drawn]),
        int(total[[ALIKE, AGAINST, REWARD_TIES]].sum()), int(total[[PEOPLE_TIE, BOTH_TIE]].sum()),
    )  # fmt: skip


def share(counts: Array) -> float:
    """The share of pairs that are ordered alike, of those that the person orders."""
    ordered = counts[ALIKE] + counts[AGAINST] + counts[REWARD_TIES]
    return float((counts[ALIKE] + counts[REWARD_TIES] / 2) / ordered) if ordered else float("nan")


def tau_b(counts: Array) -> float:
    """Kendall's tau-b (1945, Biometrika 33) over the pairs of answers within items.

    τ_b = (C - D) / √((n - T)(n - U)): C pairs ordered alike and D against each other, of n pairs, of which T tie for
    the person and U for the reward.
    """
    n = counts.sum()
    people, reward = n - counts[PEOPLE_TIE] - counts[BOTH_TIE], n - counts[REWARD_TIES] - counts[BOTH_TIE]
    return float((counts[ALIKE] - counts[AGAINST]) / np.sqrt(people * reward)) if people * reward > 0 else float("nan")
