"""Distillation: learn the distributions of a teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leyden.batch import Batch, Trajectory
from leyden.data import PromptLoader
from leyden.divergences import Divergence, ReverseKL
from leyden.errors import UserError
from leyden.losses import score_function
from leyden.on_policy import RolloutLoader, TeacherPrompts, WithGivenAnswers
from leyden.policy import OtherPolicy, Policy, Reference, predictions_of
from leyden.rewards import Reward


class Distillation(WithGivenAnswers):
    """Make the policy predict what a teacher predicts, wherever its own answers lead (Agarwal et al. 2024, GKD).

    The loss of a token y_t is D between p(. | x, y_<t) of the teacher and π(. | x, y_<t) over the whole vocabulary, in
    answers y that π sampled, or that rows give; no gradient goes through the sampling. With `teacher_system` the
    teacher has another x than the policy, which learns to do without it (Askell et al. 2021, context distillation).

    Deviations: every token of a step weighs the same, whatever the length of its answer; a coin is tossed for each
    prompt, not for each batch; both distributions are those at the temperature of sampling.

    Args:
        teacher: another model with the same tokenizer; None is the reference, so the policy before training.
        teacher_system: a system prompt that only the teacher sees, in the place of the prompt's own.
        divergence: D; None is ReverseKL.
        given: share of prompts whose row's own answer is trained on and not a sample, 1 - λ in the paper.
        reward: scores answers, to be logged; nothing is learnt from it.
    """

    kl_responses = 1
    needs_reward = False

    def __init__(
        self,
        *args: Any,
        teacher: Policy | None = None,
        teacher_system: str | None = None,
        divergence: Divergence | None = None,
        reward: Reward | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, reward=reward, **kwargs)
        if teacher is None and teacher_system is None and not self.has_reference_policy:
            raise UserError(
                "--model.teacher.path: missing; the policy before training has nothing to teach it: give another "
                "model, or --model.teacher_system, a system prompt that the policy learns to do without"
            )
        self._teacher = (teacher,)  # not registered: it is no part of what is trained
        self.teacher: Reference | None = None
        self.teacher_system, self.divergence = teacher_system, divergence or ReverseKL()
        self.teacher_prompts: TeacherPrompts | None = None
        if self.divergence.sampled and (self.given or not self.sampling.is_full):
            raise UserError(
                f"--model.divergence {type(self.divergence).__name__}: it is estimated from samples of the policy; "
                "leave out --model.given, top_k, top_p and a temperature of 0, or set --model.divergence ReverseKL"
            )

    def configure_model(self) -> None:
        super().configure_model()
        if (teacher := self._teacher[0]) is not None and self.teacher is None and not self.trainer.predicting:
            self._check_samples(teacher)
            self.teacher = OtherPolicy(teacher, self.policy, "the teacher", "--model.teacher")
            self.shard_policy(teacher)
            longest, room = getattr(self.data, "longest_row", 0), teacher.positions
            if room is not None and longest > room:
                raise UserError(
                    f"the longest row has {longest} tokens but {teacher.path} has positions for {room}; "
                    f"set --data.max_length {room}"
                )

    def _check_samples(self, teacher: Policy) -> None:
        """That what a teacher can say is enough, before anything is sampled."""
        if teacher.samples_only and not (self.divergence.sampled and self.temperature == 1):
            raise UserError(
                f"--model.teacher {type(teacher).__name__}: it gives log-probs of sampled tokens alone, at temperature "
                "1; set --model.divergence SampledReverseKL and --model.sampling.temperature 1"
            )

    def rehearse(self, batch: Batch) -> list[Tensor]:
        if self.teacher is not None:
            self.teacher(batch)
        return super().rehearse(batch)

    def experience(self, loader: PromptLoader) -> RolloutLoader:
        found = super().experience(loader)
        if self.teacher_system is not None:
            positions = (self._teacher[0] or self.policy).positions
            room = None if positions is None else positions - self.sampling.max_new_tokens
            self.teacher_prompts = TeacherPrompts(self.teacher_system, loader.prompts, self.data, room)
            answers = self.samples * self.sampling.max_new_tokens
            self.micro_batches.limit_to(self.teacher_prompts.student_budget(self.budget, answers))
        return found

    def loss(self, batch: Batch) -> Tensor:
        assert isinstance(batch, Trajectory)
        teacher, prompts = self.teacher or self.reference, self.teacher_prompts
        assert teacher is not None
        seen = batch if prompts is None else prompts.seen(batch)
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
