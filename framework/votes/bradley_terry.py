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
    point = fit(*total[:, part][:, :, part])
    drawn = list[Array]()
    rates = list[Array]()
    prior = PRIOR * _compared(total[:, part][:, :, part])
    for weights in resampled(len(ballots.items), draws if part else 0):
        wins, ties = table.total(weights)[:, part][:, :, part]
        drawn.append(fit(wins, ties, prior=prior, start=point).theta)
        rates.append(win_rates(wins, ties))
    order = sorted(range(len(part)), key=lambda at: -point.theta[at])
    wins, ties = total[:, part][:, :, part]
    shares = win_rates(wins, ties)
    thetas, samples = (np.array(rows).reshape(len(rows), len(part)) for rows in (drawn, rates))
    return Scores(
        [models[part[at]] for at in order],
        [estimate(float(point.theta[at]), list(thetas[:, at])) for at in order],
        [estimate(float(shares[at]), list(samples[:, at])) for at in order],
        wins[np.ix_(order, order)], ties[np.ix_(order, order)], point.nu, thetas[:, order], point.prior, apart,
    )  # fmt: skip


# -- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """θ with sum 0, and ν; `prior` says whether one was needed."""

    theta: Array
    nu: float
    prior: bool = False


def fit(wins: Array, ties: Array, prior: Array | None = None, start: Fit | None = None) -> Fit:
    """The most likely scores θ and tie parameter ν of Davidson (1970, J. Am. Stat. Assoc. 65, equations 2.2 and 2.3).

    With π = exp(θ): P(i beats j) = π_i / (π_i + π_j + ν √(π_i π_j)) and P(tie) = ν √(π_i π_j) / (π_i + π_j +
    ν √(π_i π_j)). Without ties ν is 0, and this is Bradley and Terry (1952). Divided by √(π_i π_j), the three outcomes
    have the logits d / 2, -d / 2 and η, with d = θ_i - θ_j and η = log ν: the log-likelihood is concave, and Newton's
    steps, halved where they overshoot, find its maximum.

    The maximum is finite where each model, by wins and ties, can be reached from each other one (Ford 1957), and, where
    there are ties, some wins go round in a circle, such as each of two models beating the other once: else scores and ν
    could grow together. Where that fails, `prior` is added to the wins: by default half a win each way for two models
    that were compared, as Haldane (1956) adds it to an odds ratio.

    Args:
        wins: [K, K], [i, j] how often i was better than j.
        ties: [K, K], symmetric.
        prior: wins to add where they are needed.
        start: where to begin.
    """
    needed = not _is_bounded(wins, ties)
    if needed:
        wins = wins + (PRIOR * _compared(np.stack([wins, ties])) if prior is None else prior)
    models = len(wins)
    if models < 2 or not wins.any():
        return Fit(np.zeros(models), 0.0, needed)
    tied = bool(ties.any())
    x = np.zeros(models + tied)
    if start is not None and len(start.theta) == models:
        x[:models] = start.theta
        x[models:] = np.log(start.nu) if start.nu > 0 else 0.0
    value, gradient, curvature = _likelihood(x, wins, ties)
    for _ in range(STEPS):
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-9:
            further = _likelihood(x + size * step, wins, ties)
            if further[0] >= value - 1e-12 * abs(value):
                break
            size /= 2
        x = x + size * step
        value, gradient, curvature = further
        if np.abs(size * step).max() < PRECISION:
            break
    theta = x[:models] - x[:models].mean()
    return Fit(theta, float(np.exp(x[models])) if tied else 0.0, needed)


def _likelihood(x: Array, wins: Array, ties: Array) -> tuple[float, Array, Array]:
    """Log-likelihood, its gradient, and its negative second derivatives, in (θ, η). The mean of θ, which changes
    nothing, is held by a term of its own."""
    models = len(wins)
    tied = len(x) > models
    d = x[:models, None] - x[None, :models]
    eta = x[models] if tied else -np.inf
    most = np.maximum(np.abs(d) / 2, eta)
    e_win, e_loss, e_tie = np.exp(d / 2 - most), np.exp(-d / 2 - most), np.exp(eta - most)
    z = e_win + e_loss + e_tie
    p_win, p_loss, p_tie = e_win / z, e_loss / z, e_tie / z
    n = wins + wins.T + ties
    logits = (wins * d).sum() / 2 + (ties.sum() / 2 * eta if tied else 0.0)
    value = logits - (n * (most + np.log(z))).sum() / 2 - x[:models].sum() ** 2 / 2
    slope = (wins - wins.T) / 2 - n * (p_win - p_loss) / 2
    bend = n / 4 * (p_win + p_loss - (p_win - p_loss) ** 2)
    np.fill_diagonal(bend, 0.0)
    gradient, curvature = np.zeros(len(x)), np.zeros((len(x), len(x)))
    gradient[:models] = slope.sum(1) - x[:models].sum()
    curvature[:models, :models] = np.diag(bend.sum(1)) - bend + 1.0
    if tied:
        gradient[models] = (ties - n * p_tie).sum() / 2
        curvature[models, models] = (n * p_tie * (1 - p_tie)).sum() / 2
        cross = -(n * (p_win - p_loss) * p_tie).sum(1) / 2
        curvature[:models, models] = curvature[models, :models] = cross
    return float(value), gradient, curvature


def win_rates(wins: Array, ties: Array) -> Array:
    """The share of each model's comparisons that it wins, a tie being half a win; NaN where it has none."""
    won, played = (wins + ties / 2).sum(1), (wins + wins.T + ties).sum(1)
    return np.divide(won, played, out=np.full(len(wins), np.nan), where=played > 0)


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
    return (wins + wins.T + ties > 0).astype(np.float64)


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
