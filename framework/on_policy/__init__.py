"""Learning from the policy's own answers: sample, score, keep, learn.

Called by Lightning's Trainer as any algorithm; subclassed in `leyden.algos` (PPO, GRPO, RejectionSampling) and by you.
May import `algorithm`, `rewards` and below. Begin reading at `on_policy`, the contract; `rollout` is the value that
travels, `sampler` makes it, `rollout_loader` cuts it into steps, `policy_gradient` learns from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.on_policy.engine import Engine, Native
    from leyden.on_policy.on_policy import OnPolicy
    from leyden.on_policy.policy_gradient import PolicyGradient

__all__ = ["Engine", "Native", "OnPolicy", "PolicyGradient"]

__getattr__ = lazy_exports(
    __name__,
    {
        "on_policy": "OnPolicy",
        "policy_gradient": "PolicyGradient",
        "engine": "Engine Native",
    },
)
