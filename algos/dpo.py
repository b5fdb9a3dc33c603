"""Direct preference optimisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leyden.algorithm import WithReference
from leyden.batch import Batch, pairwise_wins, preference_pairs
from leyden.objectives import Objective, Sigmoid


class DPO(WithReference):
    """Make better responses likelier than worse ones, measured against the reference (Rafailov et al. 2023, eq. 7), or
    without one (SimPO, CPO, ORPO), as the objective says. The loss is the mean over prompts of the mean over their
    pairs; K ranked responses give all K (K - 1) / 2 pairs.

    Args:
        objective: the loss of a pair as a function of its log-ratios, or log-probs: a class of `leyden.objectives`, or
            your own; None is Sigmoid.
        sft_weight: of the better response's cross-entropy in nats a token, added to the loss (Pang et al. 2024, eq. 1).
        wpo: multiply the loss of a pair by how likely the policy is to say both responses, exp of the mean over tokens
            of log π(y_t) - log Σ_v π(v)² each (Zhou et al. 2024, eq. 2, sampled alignment); no gradient goes through.
    """

    def __init__(
        self, *args: Any, objective: Objective | None = None, sft_weight: float = 0.0, wpo: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.sft_weight, self.wpo = objective or Sigmoid(), sft_weight, wpo

    @property
    def uses_reference(self) -> bool:
        return self.objective.needs_reference

    def loss(self, batch: Batch) -> Tensor:
        out = self.policy(batch, {"logp", "agreement"} if self.wpo else {"logp"})
        logp, length = batch.per_branch(out.logp), batch.per_branch(torch.ones_like(out.logp)).clamp_min(1)
        compared = batch.per_branch(self.log_ratio(batch, out.logp)) if self.uses_reference else logp
        given = compared / length if self.objective.per_token else compared
        better, worse, _ = pairs = preference_pairs(batch)
        loss = self.objective(given[better], given[worse])
        if self.wpo:
            likely = (batch.per_branch(out.logp.detach() - out.agreement) / length).exp()
            loss = loss * likely[better] * likely[worse]
            self.note("pair_weight", pairs.mean(batch, likely[better] * likely[worse]))
        reward = self.objective.beta * given
        self.note("margin", pairs.mean(batch, reward[better] - reward[worse]))
        self.note("accuracy", pairs.mean(batch, pairwise_wins(reward[better], reward[worse])))
        for name, which in ("chosen", better), ("rejected", worse):
            self.note(f"{name}_reward", pairs.mean(batch, reward[which]))
            self.note(f"{name}_logp", pairs.mean(batch, logp[which]))
        if self.uses_reference:
            self.note("chosen_drift", pairs.mean(batch, (compared / length)[better]))
        sft = self.sft_weight * -(logp / length)[better] if self.sft_weight else 0.0
        return pairs.mean(batch, loss + sft)
