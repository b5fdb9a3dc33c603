"""The critic: a value function with its own adapter and head on the policy's frozen weights."""

from __future__ import annotations

from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.policy.policy import Policy


class Critic(nn.Module):
    """Value function: the value [T] of the state before each response token, as `Outputs.value`. Without dropout.

    Args:
        policy: another policy on the same base, with its own adapter, not built yet.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.policy.build(("value",), dropout=False)

    def forward(self, batch: Batch) -> Tensor:
        value: Tensor | None = self.policy(batch, {"value"}).value
        assert value is not None
        return value
