"""Binary classifier optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from leyden.algorithm import WithLabels
from leyden.batch import Batch


class BCO(WithLabels):
    """Train the policy as a classifier of good and bad responses, whose logit is the reward r = β log π/π_ref less a
    shift δ (Jung et al. 2024).

        loss = mean over responses of -log σ(r - δ) where good, -log σ(δ - r) where bad

    δ = (mean reward of good responses + mean reward of bad ones) / 2, over the steps so far. Deviations: it holds the
    steps before this one, so that a step is the same however it is cut; and prompts are not weighted by a classifier of
    where they come from.

    Args:
        beta: β, how strongly the policy is held to the reference, in 1 / nats.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = {"chosen": (0.0, 0.0), "rejected": (0.0, 0.0)}
        """How many responses were seen, in steps, and their mean reward."""

    def loss(self, batch: Batch) -> Tensor:
        reward, good, bad = self.labelled(batch)
        shifted = reward - self.point
        return batch.response_mean(-good * F.logsigmoid(shifted) - bad * F.logsigmoid(-shifted))

    def on_step_metrics(self, metrics: Mapping[str, float]) -> None:
        for name, share in ("chosen", metrics["good_share"]), ("rejected", 1 - metrics["good_share"]):
            count, mean = self.seen[name]
            if f"{name}_reward" in metrics:
                mean += share / (count + share) * (metrics[f"{name}_reward"] - mean)
                self.seen[name] = (count + share, mean)
        self.point = (self.seen["chosen"][1] + self.seen["rejected"][1]) / 2

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["seen"] = dict(self.seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.seen = dict(checkpoint["seen"])
