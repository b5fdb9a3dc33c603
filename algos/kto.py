"""Kahneman-Tversky optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leyden.algorithm import WithLabels
from leyden.batch import Batch
from leyden.errors import UserError


class KTO(WithLabels):
    """Make good responses more likely and bad ones less, from single responses with a label: a response is worth the
    more, the further its log-ratio r is above (good) or below (bad) the KL divergence z_0 of policy and reference, and
    what is far already gains little (Ethayarajh et al. 2024, eq. 7).

        loss = mean over responses of λ_D (1 - σ(β (r - z_0))) where good, λ_U (1 - σ(β (z_0 - r))) where bad

    As published, z_0 is the mean log-ratio of responses to other prompts, at least 0, and nothing is learnt through it.
    Deviation: it is that of the step before, and not of the micro-batch, so that a step is the same however it is cut;
    the first step has 0, which is exact. A prompt borrows the same response of another prompt in every epoch.

    Args:
        beta: β, how strongly the policy is held to the reference, in 1 / nats.
        desirable_weight: λ_D, of good responses. The paper wants λ_D n_D / (λ_U n_U) from 1 to 4/3 (eq. 8), where
            n_D and n_U are the numbers of good and bad ones.
        undesirable_weight: λ_U, of bad ones.
    """

    mismatched = True

    def __init__(
        self, *args: Any, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if desirable_weight <= 0 or undesirable_weight <= 0:
            raise UserError(
                f"--model.desirable_weight {desirable_weight} --model.undesirable_weight {undesirable_weight}: give "
                "more than 0 of both"
            )
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def loss(self, batch: Batch) -> Tensor:
        reward, good, bad = self.labelled(batch)
        good_loss = self.desirable_weight * (1 - torch.sigmoid(reward - self.point))
        bad_loss = self.undesirable_weight * (1 - torch.sigmoid(self.point - reward))
        return batch.response_mean(good * good_loss + bad * bad_loss)

    def on_step_metrics(self, metrics: Mapping[str, float]) -> None:
        self.point = self.beta * max(0.0, metrics["kl"])
