"""On-policy algorithms with a teacher: another model, or the policy before training with another system prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leyden.batch.forest import Batch
from leyden.data.prompts import PromptLoader
from leyden.errors import UserError
from leyden.on_policy.on_policy import OnPolicy
from leyden.on_policy.rollout_loader import RolloutLoader
from leyden.on_policy.teacher_prompts import TeacherPrompts
from leyden.policy.policy import Policy, Reference
from leyden.policy.reference import OtherPolicy


class WithTeacher(OnPolicy):
    """Has a frozen model that knows better, built with the policy and asked about the same responses.

    The loss of a subclass begins with `ask_teacher`.

    Args:
        teacher: another model with the same tokenizer; None is the reference, so the policy before training.
        teacher_system: a system prompt that only the teacher sees, in the place of the prompt's own.

    Raises:
        UserError: the teacher would be the policy itself, with the same prompt.
    """

    def __init__(
        self, *args: Any, teacher: Policy | None = None, teacher_system: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
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
            self.check_teacher(teacher)
            self.teacher = OtherPolicy(teacher, self.policy, "the teacher", "--model.teacher")
            self.shard_policy(teacher)
            longest, room = getattr(self.data, "longest_row", 0), teacher.positions
            if room is not None and longest > room:
                raise UserError(
                    f"the longest row has {longest} tokens but {teacher.path} has positions for {room}; "
                    f"set --data.max_length {room}"
                )

    def check_teacher(self, teacher: Policy) -> None:
        """That the loss can do with what this model says, before anything is sampled; else a `UserError`."""

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
