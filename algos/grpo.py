"""Group-relative policy optimisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leyden.advantages import group_relative
from leyden.batch.trajectory import Trajectory
from leyden.errors import UserError
from leyden.on_policy.policy_gradient import PolicyGradient


class GRPO(PolicyGradient):
    """Learn from rewards without a value function: a response is as good as it beats the others to its prompt (Shao et
    al. 2024, section 4.1).

    Deviations: the KL is in the reward, not a k3 term of the loss, whose gradient is that of another divergence; every
    token of a step weighs the same, whatever the length of its response, and advantages are not divided by the standard
    deviation within a prompt unless `scale` is set, since both bias the gradient (Liu et al. 2025).

    Args:
        scale: divide advantages by the standard deviation within a prompt, as published.
        samples: responses to each prompt, 2 or more.
    """

    def __init__(self, *args: Any, samples: int = 8, scale: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, samples=samples, **kwargs)
        if samples < 2:
            raise UserError(
                f"--model.samples {samples}: a response is compared with the others to its prompt; give 2 or more, or "
                "use PPO"
            )
        self.scale = scale

    def advantages(self, whole: Trajectory, reward: Tensor) -> None:
        score = whole.per_branch(reward)
        whole.advantage = whole.spread(group_relative(score, whole.group, self.scale))
