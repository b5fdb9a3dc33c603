"""A value function beside a policy: an adapter and a head of its own on the weights that the policy keeps frozen."""

from __future__ import annotations

from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.policy.policy import Policy


class Critic(nn.Module):
    """Values [T] of the state before each response token, as `Outputs.value`. Without dropout.

    Args:
        policy: another policy on the same base, with an adapter of its own, not built yet.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.policy.build(("value",), dropout=False)

    def forward(self, batch: Batch) -> Tensor:
        value: Tensor | None = self.policy(batch, {"value"}).value
        assert value is not None
        return value
