"""Learning from the policy's own answers: sample, score, keep, learn.

Called by Lightning's Trainer as any algorithm; subclassed in `leyden.algos` (PPO, GRPO, OnlineDPO, RejectionSampling,
Distillation) and by you. May import `algorithm`, `rewards` and below. Begin reading at `on_policy`, the contract;
`rollout` is the value that travels, `sampler` makes it, `rollout_loader` cuts it into steps, `policy_gradient` learns
from it; with `given_answers` and `teacher` it is distilled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.on_policy.given_answers import WithGivenAnswers
    from leyden.on_policy.on_policy import OnPolicy
    from leyden.on_policy.policy_gradient import PolicyGradient
    from leyden.on_policy.reward_shaping import KLController, ScoreTransform
    from leyden.on_policy.rollout import AnsweredPrompt, Rollout
    from leyden.on_policy.rollout_loader import RolloutLoader
    from leyden.on_policy.sampler import Sampler
    from leyden.on_policy.teacher import WithTeacher

__all__ = [
    "AnsweredPrompt",
    "KLController",
    "OnPolicy",
    "PolicyGradient",
    "Rollout",
    "RolloutLoader",
    "Sampler",
    "ScoreTransform",
    "WithTeacher",
    "WithGivenAnswers",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "given_answers": "WithGivenAnswers",
        "on_policy": "OnPolicy",
        "policy_gradient": "PolicyGradient",
        "reward_shaping": "KLController ScoreTransform",
        "rollout": "AnsweredPrompt Rollout",
        "sampler": "Sampler",
        "rollout_loader": "RolloutLoader",
        "teacher": "WithTeacher",
    },
)
