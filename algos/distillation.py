"""Distillation: learn the distributions of a teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leyden.batch import Batch, Trajectory
from leyden.losses import score_function
from leyden.on_policy import WithGivenAnswers, WithTeacher
from leyden.policy import predictions_of
from leyden.rewards import Reward


class Distillation(WithTeacher, WithGivenAnswers):
    """Make the policy predict what a teacher predicts, wherever its own answers lead (Agarwal et al. 2024, GKD).

    The loss of a token y_t is D between p(. | x, y_<t) of the teacher and π(. | x, y_<t) over the whole vocabulary, in
    answers y that π sampled, or that rows give; no gradient goes through the sampling. With `teacher_system` the
    teacher has another x than the policy, which learns to do without it (Askell et al. 2021, context distillation).

    Deviations: every token of a step weighs the same, whatever the length of its answer; a coin is tossed for each
    prompt, not for each batch; both distributions are those at the temperature of sampling.

    Args:
        teacher, teacher_system, divergence: see `WithTeacher`.
        given: share of prompts whose row's own answer is trained on and not a sample, 1 - λ in the paper.
        reward: scores answers, to be logged; nothing is learnt from it.
    """

    kl_responses = 1
    needs_reward = False

    def __init__(self, *args: Any, reward: Reward | None = None, **kwargs: Any) -> None:
        super().__init__(*args, reward=reward, **kwargs)

    def loss(self, batch: Batch) -> Tensor:
        assert isinstance(batch, Trajectory)
        teacher, seen = self.ask_teacher(batch)
        if self.divergence.sampled:
            theirs = seen.carried_to(batch, teacher(seen, self.temperature))
            logp = self.policy(batch, {"logp"}, self.temperature).logp
            far = self.divergence(logp, theirs)
            loss = score_function(far, logp, batch.sampled_logp)
        else:
            there = teacher.predictions(seen, self.temperature)
            here = predictions_of(self.policy, self.policy(batch, {"predictions"}, self.temperature))
            loss = far = here.divergence(there, self.divergence)
        self.note("policy/divergence", batch.token_mean(far))
        return batch.token_mean(loss)
