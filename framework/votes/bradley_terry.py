"""Scores of models from people's votes: Bradley and Terry's model with Davidson's ties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leyden.votes.ballots import Ballots, gather
from leyden.votes.bootstrap import DRAWS, Array, Estimate, Sums, estimate, resampled, sums
from leyden.votes.vote import Item, Vote

STEPS, PRECISION = 100, 1e-6  # a step of Newton's that is so short leaves an error near its square
HALVINGS = 30
PRIOR = 0.5
"""Wins that each of two models is given over the other where the votes alone have no finite scores."""


@dataclass(frozen=True)
class Scores:
    """Scores of models, the best first.

    Args:
        models: their names.
        scores: in nats, with a mean of 0: a model with 1 more than another wins e times as often as it loses.
        win_rates: share of a model's comparisons that it wins, a tie being half a win.
        wins: [i, j] is how often i was better than j.
        ties: [i, j] is how often both were as good.
        nu: Davidson's ν: two models of one score tie with probability ν / (2 + ν).
        draws: the scores in each sample of items.
        prior: whether `PRIOR` was needed.
        apart: models that no vote compares with these, and that have no score therefore.
    """

    models: list[str]
    scores: list[Estimate]
    win_rates: list[Estimate]
    wins: Array
    ties: Array
    nu: float
    draws: Array
    prior: bool = False
    apart: tuple[str, ...] = ()

    def difference(self, one: int, other: int) -> Estimate:
        """How much more one model scores than another, with its own interval."""
        value = self.scores[one].value - self.scores[other].value
        return estimate(value, list(self.draws[:, one] - self.draws[:, other]))

    def notes(self) -> list[str]:
        """What the reader of these scores must know, one sentence each."""
        said = []
        if self.apart:
            said.append(
                f"No vote compares {', '.join(self.apart)} with {', '.join(self.models)}: without a common scale the "
                "former have no score."
            )
        if self.prior:
            said.append(
                "Some model always wins or always loses, so its score has no bound: each two models that were compared "
                "were given half a win more each way."
            )
        return said


def bradley_terry(items: Sequence[Item], votes: Sequence[Vote], draws: int = DRAWS) -> Scores:
    """Scores of the models whose answers were ranked, with intervals over items.

    Every pair of answers in a ranking is a comparison of their models; two answers of one model are none, and neither
    are answers whose model is not known. Where the votes leave models in parts that no comparison joins, the part with
    the most comparisons has scores.
    """
    ballots = gather(items, votes)
    models, table = _comparisons(ballots)
    total = table.total()
    part = _largest(total)
    apart = tuple(name for at, name in enumerate(models) if at not in part)
    total = total[:, part][:, :, part]
    if not part:
        return Scores([], [], [], total[0], total[1], 0.0, np.zeros((0, 0)), apart=apart)
    point = fit(total[0], total[1])
    samples = np.array(
        [table.total(weights)[:, part][:, :, part] for weights in resampled(len(ballots.items), draws)]
    ).reshape(-1, 2, len(part), len(part))
    prior = PRIOR * _compared(total)
    thetas = fit_all(samples[:, 0], samples[:, 1], prior, np.append(point.theta, max(point.nu, 1e-3)))[0]
    rates = np.array([win_rates(wins, ties) for wins, ties in samples]).reshape(-1, len(part))
    order = sorted(range(len(part)), key=lambda at: -point.theta[at])
    wins, ties = total
    shares = win_rates(wins, ties)
    return Scores(
        [models[part[at]] for at in order],
        [estimate(float(point.theta[at]), list(thetas[:, at])) for at in order],
        [estimate(float(shares[at]), list(rates[:, at])) for at in order],
        wins[np.ix_(order, order)], ties[np.ix_(order, order)], point.nu, thetas[:, order], point.prior, apart,
    )  # fmt: skip


# -- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """θ with sum 0, and ν; `prior` says whether one was needed."""

    theta: Array
    nu: float
    prior: bool = False


def fit(wins: Array, ties: Array) -> Fit:
    """The most likely scores θ and tie parameter ν of Davidson (1970, J. Am. Stat. Assoc. 65, equations 2.2 and 2.3).

    With π = exp(θ): P(i beats j) = π_i / (π_i + π_j + ν √(π_i π_j)) and P(tie) = ν √(π_i π_j) / (π_i + π_j +
    ν √(π_i π_j)). Without ties ν is 0, and this is Bradley and Terry (1952).

    The maximum is finite where each model, by wins and ties, can be reached from each other one (Ford 1957), and, where
    there are ties, some wins go round in a circle, such as each of two models beating the other once: else scores and ν
    could grow together. Where that fails, each two models that were compared are given half a win more each way, as
    Haldane (1956) adds it to an odds ratio.

    Args:
        wins: [K, K], [i, j] how often i was better than j.
        ties: [K, K], symmetric.
    """
    needed = not _is_bounded(wins, ties)
    theta, nu = fit_all(wins[None], ties[None], PRIOR * _compared(np.stack([wins, ties])))
    return Fit(theta[0], float(nu[0]), needed)


def fit_all(wins: Array, ties: Array, prior: Array, start: Array | None = None) -> tuple[Array, Array]:
    """θ [N, K] and ν [N] of N tables of wins and ties, [N, K, K] each, as `fit` has it.

    Divided by √(π_i π_j), the three outcomes have the logits d / 2, -d / 2 and η, with d = θ_i - θ_j and η = log ν: the
    log-likelihood is concave, and Newton's steps, halved where they overshoot, find its maximum.

    Args:
        wins: of each table.
        ties: of each table.
        prior: wins to add to a table that has no finite maximum.
        start: θ and ν to begin at.
    """
    count, models = wins.shape[:2]
    if models < 2 or not count:
        return np.zeros((count, models)), np.zeros(count)
    needed = np.array([not _is_bounded(*one) for one in zip(wins, ties, strict=True)])
    wins = wins + needed[:, None, None] * prior
    x = np.zeros((count, models + 1))
    if start is not None:
        x[:] = np.append(start[:-1], np.log(start[-1]))
    value, slope, bend = _likelihood(x, wins, ties)
    for _ in range(STEPS):
        step = np.linalg.solve(bend, slope[..., None])[..., 0]
        for _ in range(HALVINGS):
            further = _likelihood(x + step, wins, ties)
            worse = further[0] < value - 1e-12 * abs(value)
            if not worse.any():
                break
            step = np.where(worse[:, None], step / 2, step)
        x, (value, slope, bend) = x + step, further
        if abs(step).max() < PRECISION:
            break
    theta = x[:, :models] - x[:, :models].mean(1, keepdims=True)
    return theta, np.where(ties.any((1, 2)), np.exp(x[:, models]), 0.0)


def _likelihood(x: Array, wins: Array, ties: Array) -> tuple[Array, Array, Array]:
    """Log-likelihood [N], its gradient, and its negative second derivatives, in θ and η. Terms of their own hold what
    changes nothing: the mean of θ, and η where there are no ties."""
    models = wins.shape[1]
    theta, eta = x[:, :models], x[:, models]
    tied = ties.any((1, 2))
    d = theta[:, :, None] - theta[:, None, :]
    eta = np.where(tied, eta, -np.inf)[:, None, None]
    most = np.maximum(abs(d) / 2, eta)
    odds = np.stack([np.exp(d / 2 - most), np.exp(-d / 2 - most), np.exp(eta - most)])
    z = odds.sum(0)
    win, loss, tie = odds / z
    n = wins + wins.swapaxes(1, 2) + ties
    value = (wins * d).sum((1, 2)) / 2 + np.where(tied, ties.sum((1, 2)) * x[:, models], 0.0) / 2
    value = value - (n * (most + np.log(z))).sum((1, 2)) / 2 - theta.sum(1) ** 2 / 2
    slope, bend = np.zeros_like(x), np.zeros((*x.shape, models + 1))
    slope[:, :models] = ((wins - wins.swapaxes(1, 2) - n * (win - loss)) / 2).sum(2) - theta.sum(1, keepdims=True)
    slope[:, models] = np.where(tied, (ties - n * tie).sum((1, 2)) / 2, 0.0)
    pairs = n / 4 * (win + loss - (win - loss) ** 2) * (1 - np.eye(models))
    bend[:, :models, :models] = np.eye(models) * pairs.sum(2, keepdims=True) - pairs + 1.0
    bend[:, models, models] = np.where(tied, (n * tie * (1 - tie)).sum((1, 2)) / 2, 1.0)
    bend[:, :models, models] = bend[:, models, :models] = -(n * (win - loss) * tie).sum(2) / 2
    return value, slope, bend


def win_rates(wins: Array, ties: Array) -> Array:
    """The share of each model's comparisons that it wins, a tie being half a win; NaN where it has none."""
    won, played = (wins + ties / 2).sum(1), (wins + wins.T + ties).sum(1)
    rates: Array = np.divide(won, played, out=np.full(len(wins), np.nan), where=played > 0)
    return rates


# -- which models were compared --------------------------------------------------------------------------------------


def _comparisons(ballots: Ballots) -> tuple[list[str], Sums]:
    """The models, and a table [2, K, K] of wins and ties."""
    models = sorted({answer.model for item in ballots.items for answer in item.answers if answer.model})
    numbers, size = {name: at for at, name in enumerate(models)}, len(models)
    rows = []
    for number, vote in ballots.ranked:
        names = [answer.model for answer in ballots.items[number].answers]
        for i, j, tie in vote.pairs():
            one, other = names[i], names[j]
            if not one or not other or one == other:
                continue
            a, b = numbers[one], numbers[other]
            rows.append((number, (tie * size + a) * size + b, 1.0))
            if tie:
                rows.append((number, (size + b) * size + a, 1.0))
    return models, sums(rows, (2, size, size))


def _compared(table: Array) -> Array:
    """[K, K]: 1 for two models that were compared, else 0."""
    wins, ties = table
    met: Array = (wins + wins.T + ties > 0).astype(np.float64)
    return met


def _reach(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[i, j]: whether j can be reached from i in one step or more."""
    reach = edges.copy()
    for k in range(len(edges)):
        reach |= reach[:, k : k + 1] & reach[k : k + 1, :]
    return reach


def _largest(table: Array) -> list[int]:
    """The models of the connected part with the most comparisons; none where nothing was compared."""
    joined = _compared(table) > 0
    reach = _reach(joined) | np.eye(len(joined), dtype=bool)
    played = (table[0] + table[0].T + table[1]).sum(1)
    if not joined.any():
        return []
    best = max(range(len(joined)), key=lambda at: float(played[reach[at]].sum()))
    return [int(at) for at in np.flatnonzero(reach[best])]


def _is_bounded(wins: Array, ties: Array) -> bool:
    """Whether the likelihood has a finite maximum for sure."""
    beats = wins > 0
    if not (_reach(beats | (ties > 0)) | np.eye(len(wins), dtype=bool)).all():
        return False
    return not ties.any() or bool(np.diagonal(_reach(beats)).any())
