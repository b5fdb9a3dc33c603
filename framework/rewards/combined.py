"""Rewards made of rewards: a weighted sum, and an ensemble that is the more careful the less its members agree."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from leyden.errors import UserError
from leyden.example import Sample
from leyden.policy.policy import Policy
from leyden.rewards.reward import Reward, attach, name_of, score_with_terms

SPREAD = "spread"
"""The term of an `Ensemble` that says how far its members are apart."""


class Combined(nn.Module, Reward):
    """Several rewards as one. After a call `terms` holds the scores of each, and what each is made of itself as
    `REWARD.TERM`. A subclass makes one score of theirs."""

    reserved: tuple[str, ...] = ()
    """Names of terms of its own."""

    def __init__(self, rewards: list[Reward]) -> None:
        super().__init__()
        self.rewards = list(rewards)
        self.modules_among = nn.ModuleList([reward for reward in rewards if isinstance(reward, nn.Module)])
        names, counts = [name_of(reward) for reward in rewards], Counter[str]()
        self.names = []
        for name in names:
            counts[name] += 1
            twice = names.count(name) > 1 or name in self.reserved
            self.names.append(f"{name}-{counts[name]}" if twice else name)

    def attach(self, policy: Policy) -> None:
        for reward in self.rewards:
            attach(reward, policy)

    def forward(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [N] float32, on the CPU."""
        terms, scores = dict[str, Tensor](), list[Tensor]()
        for name, reward in zip(self.names, self.rewards, strict=True):
            terms[name], parts = score_with_terms(reward, samples)
            terms |= {f"{name}.{part}": values for part, values in parts.items()}
            scores.append(terms[name])
        found, own = self.together(torch.stack(scores))
        self.terms = terms | own
        return found

    @abstractmethod
    def together(self, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One score of the members' [M, N] for each sample: [N], and terms of its own, [N] each."""


class WeightedSum(Combined):
    """Several rewards, each times its weight, added up; the terms of its members are not weighted.

    Args:
        rewards: by class path; they nest.
        weights: one for each reward, in their order; default: 1 each.

    Raises:
        UserError: no reward, or not as many weights as rewards.
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if not rewards or len(rewards) != len(weights):
            raise UserError(f"WeightedSum: {len(rewards)} rewards but {len(weights)} weights; give one weight for each")
        if not torch.tensor(weights, dtype=torch.float32).isfinite().all():
            raise UserError(f"WeightedSum: weights {weights}; give finite numbers")
        super().__init__(rewards)
        self.weights = weights

    def together(self, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = torch.zeros(scores.shape[1])
        for weight, values in zip(self.weights, scores, strict=True):
            total += weight * values
        return total, {}


class Ensemble(Combined):
    """Rewards of the same thing, usually reward models of different seeds or data, that stand in for one another: what
    they do not agree on is worth less, so that a policy has less to gain from the mistake of one of them.

    With r_i the score of member i of M, μ their mean and σ their standard deviation √(1/M Σ (r_i - μ)²), an answer's
    score is μ - k σ (`mean`; Eisenstein et al. 2023, "mean minus std") or min r_i (`worst`; Coste et al. 2024,
    worst-case optimisation). Coste et al. 2024 take off k σ², the variance (uncertainty-weighted optimisation); here σ
    is in the unit of the scores, so that k means the same whatever their scale. Terms are each member's score, on the
    common scale, and `spread`, which is σ.

    Bradley-Terry leaves open where the zero of a reward model is, and members with other zeros would disagree on every
    answer by a constant, and one of them always be the worst. Train them with `--model.centre`, or give `means`.

    Args:
        rewards: two or more by class path. Adapters of `ModelReward` on one base hold that base once.
        combine: `mean`, less k deviations, or `worst`.
        deviations: k of `mean`, 0 or more; default 1.
        means: of each member's scores on the same answers; they are taken off first.
        scales: of each member, usually the standard deviation of its scores; what is left is divided by them.

    Raises:
        UserError: fewer than two rewards, an argument that would be ignored, or not one mean and scale for each.
    """

    reserved = (SPREAD,)

    def __init__(
        self,
        rewards: list[Reward],
        combine: Literal["mean", "worst"] = "mean",
        deviations: float | None = None,
        means: list[float] | None = None,
        scales: list[float] | None = None,
    ) -> None:
        if len(rewards) < 2:
            raise UserError(f"Ensemble: {len(rewards)} rewards have no spread; give two or more, or the one by itself")
        if combine == "worst" and deviations is not None:
            raise UserError("Ensemble: deviations are those of combine mean; leave them out, or set combine mean")
        k = 1.0 if deviations is None else float(deviations)
        if not 0 <= k < float("inf"):
            raise UserError(f"Ensemble: deviations {k:g}; give 0 or more, how many are taken off the mean")
        super().__init__(rewards)
        self.combine, self.deviations = combine, k
        self.means = _one_each("means", means, 0.0, len(rewards))
        self.scales = _one_each("scales", scales, 1.0, len(rewards))
        if not (self.scales > 0).all():
            raise UserError(f"Ensemble: scales {scales}; give numbers above 0")

    def together(self, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scores = (scores - self.means[:, None]) / self.scales[:, None]
        spread = scores.std(0, correction=0)
        found = scores.amin(0) if self.combine == "worst" else scores.mean(0) - self.deviations * spread
        return found, dict(zip(self.names, scores, strict=True)) | {SPREAD: spread}


def _one_each(name: str, values: list[float] | None, default: float, members: int) -> Tensor:
    """[M] one finite number for each member."""
    numbers = torch.tensor([default] * members if values is None else values, dtype=torch.float32)
    if len(numbers) != members:
        raise UserError(f"Ensemble: {members} rewards but {len(numbers)} {name}; give one for each")
    if not numbers.isfinite().all():
        raise UserError(f"Ensemble: {name} {values}; give finite numbers")
    return numbers
