"""Online direct preference optimisation: pairs of the policy's own answers, ranked by a reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leyden.batch import Batch, Trajectory, pairwise_wins, preference_pairs
from leyden.errors import UserError
from leyden.objectives import Objective, Sigmoid
from leyden.on_policy import OnPolicy


class OnlineDPO(OnPolicy):
    """Each rollout answers every prompt `samples` times; every pair of answers of which one scores higher is a pair of
    DPO (Guo et al. 2024, algorithm 1). Answers of equal scores say nothing about each other and are no pair.

    The loss is the mean over prompts of the mean over their pairs, 0 of a prompt whose answers all score the same.
    Deviations: any reward in the place of an annotator, and all pairs of more than two answers. The reference stays
    where an objective needs none, for the KL of the rollout.

    Args:
        samples: responses to each prompt, 2 or more.
        objective: the loss of a pair as a function of its log-ratios, or log-probs, as for DPO; None is Sigmoid.
    """

    def __init__(self, *args: Any, samples: int = 4, objective: Objective | None = None, **kwargs: Any) -> None:
        super().__init__(*args, samples=samples, **kwargs)
        if samples < 2:
            raise UserError(f"--model.samples {samples}: a pair takes two answers; give 2 or more")
        if self.sampling.temperature == 0:
            raise UserError(
                "--model.sampling.temperature 0: all answers to a prompt would be the same and none the best; give a "
                "temperature above 0"
            )
        self.objective = objective or Sigmoid()

    def loss(self, batch: Batch) -> Tensor:
        assert isinstance(batch, Trajectory)
        token_logp = self.policy(batch, {"logp"}, self.temperature).logp
        compared = token_logp - batch.ref_logp if self.objective.needs_reference else token_logp
        given = batch.branch_mean(compared) if self.objective.per_token else batch.per_branch(compared)
        every = preference_pairs(batch)  # responses stand best first
        better, worse = given[every.better], given[every.worse]
        differ = batch.score[every.better] > batch.score[every.worse]
        pairs = every.only(batch, differ)
        margin, wins = self.objective.beta * (better - worse), pairwise_wins(better, worse)
        self.note("margin", pairs.mean(batch, margin))
        self.note("accuracy", every.mean(batch, torch.where(differ, wins, 0.5)))
        return pairs.mean(batch, self.objective(better, worse))
