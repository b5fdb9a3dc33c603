"""Direct preference optimisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leyden.algorithm.with_reference import Compared
from leyden.batch.forest import Batch
from leyden.batch.pairs import pairs, won
from leyden.objectives import Objective, Sigmoid

USUAL = Sigmoid(beta=0.1)


class DPO(Compared):
    """Make better responses likelier than worse ones, measured against the reference (Rafailov et al. 2023, eq. 7).

    The loss is the mean over prompts of the mean over their pairs; K ranked responses give all K (K - 1) / 2 pairs.

    Args:
        objective: the loss of a pair as a function of its log-ratios: Sigmoid, Robust, Hinge, IPO, or your own.
        sft_weight: weight of the better response's cross-entropy, in nats a token averaged over prompts, added to the
            loss (Pang et al. 2024, eq. 1).
    """

    def __init__(self, *args: Any, objective: Objective = USUAL, sft_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.sft_weight = objective, sft_weight

    def loss(self, batch: Batch) -> Tensor:
        logp = self.policy(batch).logp
        ratio = batch.per_branch(self.log_ratio(batch, logp))
        logp, tokens = batch.per_branch(logp), batch.per_branch(torch.ones_like(logp)).clamp_min(1)
        better, worse, _ = found = pairs(batch)
        given = ratio / tokens if self.objective.per_token else ratio
        loss = found.mean(batch, self.objective(given[better], given[worse]))

        reward, per_token = self.objective.beta * given, (ratio / tokens)[better]
        self.note("margin", found.mean(batch, reward[better] - reward[worse]))
        self.note("accuracy", found.mean(batch, won(reward[better], reward[worse])))
        for name, which in ("chosen", better), ("rejected", worse):
            self.note(f"{name}_reward", found.mean(batch, reward[which]))
            self.note(f"{name}_logp", found.mean(batch, logp[which]))
        self.note("chosen_drift", found.mean(batch, per_token))
        if self.sft_weight:
            loss = loss + self.sft_weight * found.mean(batch, -(logp / tokens)[better])
        return loss
