"""On-policy algorithms with a teacher: another model, or the policy before training with another system prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leyden.batch.forest import Batch
from leyden.data.prompts import PromptLoader
from leyden.divergences import Divergence, ReverseKL
from leyden.errors import UserError
from leyden.on_policy.on_policy import OnPolicy
from leyden.on_policy.rollout_loader import RolloutLoader
from leyden.on_policy.teacher_prompts import TeacherPrompts
from leyden.policy.policy import Policy, Reference
from leyden.policy.reference import OtherPolicy


class WithTeacher(OnPolicy):
    """Has a frozen model that knows better, built with the policy and asked about the same responses.

    The loss of a subclass begins with `ask_teacher`. Among the bases it stands before `WithGivenAnswers`.

    Args:
        teacher: another model with the same tokenizer; None is the reference, so the policy before training.
        teacher_system: a system prompt that only the teacher sees, in the place of the prompt's own.
        divergence: D, how far the policy is from the teacher; None is ReverseKL.

    Raises:
        UserError: the teacher would be the policy itself, with the same prompt; or the divergence is estimated from
            samples, and these would not be the policy's own.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Policy | None = None,
        teacher_system: str | None = None,
        divergence: Divergence | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.divergence = divergence or ReverseKL()
        if self.divergence.sampled and (self.needs_answers or not self.sampling.is_full):
            raise UserError(
                f"--model.divergence {type(self.divergence).__name__}: it is estimated from samples of the policy; "
                "leave out --model.given, top_k, top_p and a temperature of 0, or set --model.divergence ReverseKL"
            )
        if teacher is None and teacher_system is None and not self.has_reference_policy:
            raise UserError(
                "--model.teacher.path: missing; the policy before training has nothing to teach it: give another "
                "model, or --model.teacher_system, a system prompt that the policy learns to do without"
            )
        self._teacher = (teacher,)  # not registered: it is no part of what is trained
        self.teacher: Reference | None = None
        self.teacher_system = teacher_system
        self.teacher_prompts: TeacherPrompts | None = None

    def configure_model(self) -> None:
        super().configure_model()
        if (teacher := self._teacher[0]) is not None and self.teacher is None and not self.trainer.predicting:
            self._check_teacher(teacher)
            self.teacher = OtherPolicy(teacher, self.policy, "the teacher", "--model.teacher")
            self.shard_policy(teacher)
            longest, room = getattr(self.data, "longest_row", 0), teacher.positions
            if room is not None and longest > room:
                raise UserError(
                    f"the longest row has {longest} tokens but {teacher.path} has positions for {room}; "
                    f"set --data.max_length {room}"
                )

    def _check_teacher(self, teacher: Policy) -> None:
        """That the divergence can do with what this model says. Raises `UserError`."""
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

    def ask_teacher(self, batch: Batch) -> tuple[Reference, Batch]:
        """The teacher, and a micro-batch as it sees it: the same responses, after its own prompts."""
        teacher = self.teacher or self.reference
        assert teacher is not None
        return teacher, batch if self.teacher_prompts is None else self.teacher_prompts.seen(batch)
