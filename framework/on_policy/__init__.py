"""Learning from the policy's own answers: sample, score, keep, learn.

Called by Lightning's Trainer as any algorithm; subclassed in `leyden.algos` (PPO, GRPO, OnlineDPO, RejectionSampling)
and by you. May import `algorithm`, `rewards` and below. Begin reading at `on_policy`, the contract; `rollout` is the
value that travels, `sampler` makes it, `rollout_loader` cuts it into steps, `policy_gradient` learns from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.on_policy.on_policy import OnPolicy
    from leyden.on_policy.policy_gradient import KLController, PolicyGradient, ScoreTransform
    from leyden.on_policy.rollout import AnsweredPrompt, Rollout
    from leyden.on_policy.rollout_loader import RolloutLoader
    from leyden.on_policy.sampler import Sampler

__all__ = [
    "AnsweredPrompt",
    "KLController",
    "OnPolicy",
    "PolicyGradient",
    "Rollout",
    "RolloutLoader",
    "Sampler",
    "ScoreTransform",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "on_policy": "OnPolicy",
        "policy_gradient": "KLController PolicyGradient ScoreTransform",
        "rollout": "AnsweredPrompt Rollout",
        "sampler": "Sampler",
        "rollout_loader": "RolloutLoader",
    },
)
