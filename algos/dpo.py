"""Direct preference optimisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leyden.algorithm import WithReference
from leyden.batch import Batch, pairwise_wins, preference_pairs
from leyden.objectives import Objective, Sigmoid

DEFAULT = Sigmoid(beta=0.1)


class DPO(WithReference):
    """Make better responses likelier than worse ones, measured against the reference (Rafailov et al. 2023, eq. 7).

    The loss is the mean over prompts of the mean over their pairs; K ranked responses give all K (K - 1) / 2 pairs.

    Args:
        objective: the loss of a pair as a function of its log-ratios: Sigmoid, Robust, Hinge, IPO, or your own.
        sft_weight: weight of the better response's cross-entropy, in nats a token averaged over prompts, added to the
            loss (Pang et al. 2024, eq. 1).
    """

    def __init__(self, *args: Any, objective: Objective = DEFAULT, sft_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.sft_weight = objective, sft_weight

    def loss(self, batch: Batch) -> Tensor:
        token_logp = self.policy(batch).logp
        logp, log_ratio = batch.per_branch(token_logp), batch.per_branch(self.log_ratio(batch, token_logp))
        length = batch.per_branch(torch.ones_like(token_logp)).clamp_min(1)
        pairs = preference_pairs(batch)
        given = log_ratio / length if self.objective.per_token else log_ratio
        loss = pairs.mean(batch, self.objective(given[pairs.better], given[pairs.worse]))

        reward = self.objective.beta * given
        better, worse = reward[pairs.better], reward[pairs.worse]
        self.note("margin", pairs.mean(batch, better - worse))
        self.note("accuracy", pairs.mean(batch, pairwise_wins(better, worse)))
        for name, which in ("chosen", pairs.better), ("rejected", pairs.worse):
            self.note(f"{name}_reward", pairs.mean(batch, reward[which]))
            self.note(f"{name}_logp", pairs.mean(batch, logp[which]))
        self.note("chosen_drift", pairs.mean(batch, (log_ratio / length)[pairs.better]))
        if self.sft_weight:
            loss = loss + self.sft_weight * pairs.mean(batch, -(logp / length)[pairs.better])
        return loss
