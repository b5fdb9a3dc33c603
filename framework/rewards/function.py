"""Rewards from a function of yours; the other rewards can be imported from here too.

A trained reward model is `leyden.models.ModelReward`. The base class of all is in `leyden.rewards.reward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from leyden.class_paths import import_object
from leyden.errors import UserError
from leyden.example import Sample
from leyden.rewards.combined import Ensemble, WeightedSum
from leyden.rewards.gold import COLUMNS, Gold, Parts
from leyden.rewards.judge import HTTPJudge
from leyden.rewards.reward import Reward, name_of, score, score_with_terms

__all__ = ["COLUMNS", "Ensemble", "Function", "Gold", "HTTPJudge", "Parts", "Reward", "WeightedSum", "name_of", "score"]


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
