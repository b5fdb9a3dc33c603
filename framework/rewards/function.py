"""Rewards from a function of yours, and weighted sums of rewards; the other rewards can be imported from here too.

A trained reward model is `leyden.models.ModelReward`. The base class of all is in `leyden.rewards.reward`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leyden.class_paths import import_object
from leyden.errors import UserError
from leyden.example import Sample
from leyden.policy.policy import Policy
from leyden.rewards.gold import COLUMNS, Gold, Parts
from leyden.rewards.judge import HTTPJudge
from leyden.rewards.reward import Reward, attach, name_of, score, score_with_terms

__all__ = ["COLUMNS", "Function", "Gold", "HTTPJudge", "Parts", "Reward", "WeightedSum", "name_of", "score"]


class Function(Reward):
    """A Python function of yours: it takes a list of samples and returns one number for each, in their order; or these
    and what they are made of, to be logged: `return scores, {"length": lengths}`.

    Args:
        path: `MODULE.FUNCTION`, of the current folder or of an installed package: `my_rewards.brevity` is the function
            `brevity` in my_rewards.py.

    Raises:
        UserError: there is no such function; the message names the nearest.
    """

    def __init__(self, path: str) -> None:
        self.name, self.function = path, _load(path)

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        scores, self.terms = score_with_terms(self.function, samples)
        return scores


def _load(path: str) -> Callable[[Sequence[Sample]], Any]:
    """The function at an import path."""
    function = import_object(path, "Function", "my_rewards")
    name = path.rpartition(".")[2]
    if isinstance(function, type):
        raise UserError(
            f"Function {path}: {name} is a class; give it as a reward itself, such as --model.reward {path}"
        )
    if not callable(function):
        raise UserError(f"Function {path}: {name} is no function but {type(function).__name__}; name a function")
    return function  # type: ignore[no-any-return]


class WeightedSum(nn.Module, Reward):
    """Several rewards, each times its weight, added up. After a call `terms` holds the scores of each, unweighted, and
    what each is made of itself as `REWARD.TERM`.

    Args:
        rewards: by class path; they nest.
        weights: one for each reward, in their order; default: 1 each.

    Raises:
        UserError: no reward, or not as many weights as rewards.
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if not rewards or len(rewards) != len(weights):
            raise UserError(f"WeightedSum: {len(rewards)} rewards but {len(weights)} weights; give one weight for each")
        if not torch.tensor(weights, dtype=torch.float32).isfinite().all():
            raise UserError(f"WeightedSum: weights {weights}; give finite numbers")
        self.rewards, self.weights = list(rewards), weights
        self.modules_among = nn.ModuleList([reward for reward in rewards if isinstance(reward, nn.Module)])
        names, counts = [name_of(reward) for reward in rewards], Counter[str]()
        self.names = []
        for name in names:
            counts[name] += 1
            self.names.append(f"{name}-{counts[name]}" if names.count(name) > 1 else name)

    def attach(self, policy: Policy) -> None:
        for reward in self.rewards:
            attach(reward, policy)

    def forward(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [N] float32, on the CPU."""
        terms, total = dict[str, Tensor](), torch.zeros(len(samples))
        for name, weight, reward in zip(self.names, self.weights, self.rewards, strict=True):
            terms[name], parts = score_with_terms(reward, samples)
            terms |= {f"{name}.{part}": values for part, values in parts.items()}
            total += weight * terms[name]
        self.terms = terms
        return total
