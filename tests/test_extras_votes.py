"""Agreement and scores beside other people's programs: krippendorff, SciPy."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from voters import davidson, item, plackett_luce, vote

from leyden.votes import Item, Vote
from leyden.votes.agreement import agreement, mid_ranks
from leyden.votes.bradley_terry import bradley_terry, fit
from leyden.votes.reward_agreement import reward_agreement

krippendorff = pytest.importorskip("krippendorff")
optimize = pytest.importorskip("scipy.optimize")
stats = pytest.importorskip("scipy.stats")
STRENGTHS = {"sft": -0.8, "dpo": 0.5, "ppo": 0.2, "grpo": 0.1}


def with_ties(seed: int, shown: int = 4) -> tuple[list[Item], list[Vote]]:
    r = random.Random(seed)
    items, votes = plackett_luce(r, 50, STRENGTHS, each=r.randint(2, 5), shown=shown)
    return items, [
        replace(one, ranks=tuple(min(rank, 2) for rank in one.ranks)) if r.random() < 0.4 else one for one in votes
    ]


def table(items: list[Item], votes: list[Vote], values: Any) -> np.ndarray:
    """People by units, as krippendorff takes it: `values` gives what a vote says of each unit of its item."""
    people, columns = sorted({one.person for one in votes}), {one.id: number for number, one in enumerate(items)}
    width = len(values(votes[0]))
    cells = np.full((len(people), len(items) * width), np.nan)
    for one in votes:
        at = columns[one.item] * width
        cells[people.index(one.person), at : at + width] = values(one)
    return cells


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_that_of_krippendorff(seed: int) -> None:
    items, votes = with_ties(seed)
    found = agreement(items, votes, draws=0)
    ranks = table(items, votes, lambda one: mid_ranks(one.ranks))
    said = krippendorff.alpha(reliability_data=ranks, level_of_measurement="ordinal")
    assert found.ordinal.value == pytest.approx(said, abs=1e-10)

    def ways(one: Vote) -> list[int]:  # each pair both ways round
        signs = [int(np.sign(one.ranks[j] - one.ranks[i])) for i, j in combinations(range(4), 2)]
        return signs + [-sign for sign in signs]

    said = krippendorff.alpha(reliability_data=table(items, votes, ways), level_of_measurement="nominal")
    assert found.nominal.value == pytest.approx(said, abs=1e-10)


def test_bradley_terry_is_logistic_regression() -> None:
    """Without ties: a win of i over j is a success at x_i - x_j, without an intercept."""
    items, votes = plackett_luce(random.Random(0), 80, STRENGTHS)
    found = bradley_terry(items, votes, draws=0)
    names, rows = sorted(STRENGTHS), []
    answers = {one.id: [answer.model for answer in one.answers] for one in items}
    for one in votes:
        for i, j, _ in one.pairs():
            row = np.zeros(4)
            row[names.index(answers[one.item][i])] += 1
            row[names.index(answers[one.item][j])] -= 1
            rows.append(row)
    x = np.array(rows)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        d = x @ theta
        return float(np.logaddexp(0, -d).sum()), -(x / (1 + np.exp(d))[:, None]).sum(0)

    theta = optimize.minimize(loss, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    theta -= theta.mean()
    mine = {name: score.value for name, score in zip(found.models, found.scores, strict=True)}
    assert [mine[name] for name in names] == pytest.approx(theta, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_davidson_is_the_maximum_that_scipy_finds(seed: int) -> None:
    found = bradley_terry(*davidson(random.Random(seed), 150, STRENGTHS, 0.6), draws=0)
    wins, ties, models = found.wins, found.ties, len(found.models)

    def loss(x: np.ndarray) -> float:
        """As Davidson writes it, with π and ν."""
        pi, nu, total = np.exp(x[:models]), math.exp(x[models]), 0.0
        for i in range(models):
            for j in range(models):
                if i != j:
                    root = math.sqrt(pi[i] * pi[j])
                    below = pi[i] + pi[j] + nu * root
                    total += wins[i, j] * math.log(pi[i] / below) + ties[i, j] / 2 * math.log(nu * root / below)
        return -total + x[:models].sum() ** 2

    x = optimize.minimize(loss, np.zeros(models + 1), method="BFGS", options={"gtol": 1e-8}).x
    again = optimize.minimize(loss, x, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}).x
    assert [score.value for score in found.scores] == pytest.approx(again[:models] - again[:models].mean(), abs=1e-6)
    assert found.nu == pytest.approx(math.exp(again[models]), abs=1e-6)
    assert fit(wins, ties).nu == pytest.approx(found.nu)


def test_tau_b_is_that_of_scipy() -> None:
    r = random.Random(0)
    for _ in range(50):
        size = r.randint(3, 8)
        one = item(0, "abcdefgh"[:size], [float(r.randint(0, 4)) for _ in range(size)])
        places = [r.randint(1, 4) for _ in range(size)]
        ranks = [1 + sorted(set(places)).index(place) for place in places]
        found = reward_agreement([one], [vote(one, "p", *ranks)], draws=0)
        said = stats.kendalltau([-rank for rank in ranks], [answer.score for answer in one.answers]).statistic
        assert found is not None
        assert found.tau_b.value == pytest.approx(said, abs=1e-12, nan_ok=True)
