"""Rewards: classes that score samples, one float for each, and are named by class path.

Called by the on-policy sampler, by evaluation and by `leyden data label`. May import `policy` and below. Begin
reading at `reward`, the contract; `function` is the shortest implementation. A trained reward model is
`leyden.models.ModelReward`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.rewards.combined import Ensemble, WeightedSum
    from leyden.rewards.function import Function
    from leyden.rewards.gold import COLUMNS, Gold, Parts
    from leyden.rewards.judge import HTTPJudge
    from leyden.rewards.reward import Reward, name_of, score

__all__ = ["COLUMNS", "Ensemble", "Function", "Gold", "HTTPJudge", "Parts", "Reward", "WeightedSum", "name_of", "score"]

__getattr__ = lazy_exports(
    __name__,
    {
        "reward": "Reward name_of score",
        "combined": "Ensemble WeightedSum",
        "function": "Function",
        "gold": "COLUMNS Gold Parts",
        "judge": "HTTPJudge",
    },
)
