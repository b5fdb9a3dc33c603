"""Prompts as a teacher sees them, which may have a system prompt that the policy does not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leyden.batch.forest import Batch
from leyden.data.chat_template import ChatTemplate
from leyden.data.prompts import Prompt
from leyden.errors import RowError, UserError
from leyden.example import Message


class TeacherPrompts:
    """The prompts of a run with a system prompt of the teacher's.

    Args:
        system: stands in the place of a prompt's own system turn.
        prompts: all that rollouts draw from.
        data: that has their chat template.
        room: most tokens of a prompt, None without a limit.

    Raises:
        UserError: the data has no chat template or one that takes no system prompt, or the longest prompt leaves no
            room to answer.
    """

    def __init__(self, system: str, prompts: Sequence[Prompt], data: Any, room: int | None) -> None:
        if getattr(data, "template", None) is None:
            raise UserError("--model.teacher_system: it needs data with a chat template; set --data PromptData")
        self.system, self.room = system, room
        self.template: ChatTemplate = data.template
        self._prompts, self._tokens = {prompt.row: prompt for prompt in prompts}, dict[int, list[int]]()
        if prompts:
            self.tokens(max(prompts, key=lambda prompt: len(prompt.tokens)).row)

    def tokens(self, row: int) -> list[int]:
        """What the teacher is asked instead of the prompt of this number."""
        if row not in self._tokens:
            example = self._prompts[row].example
            own = example.messages[:1] and example.messages[0]["role"] == "system"
            turns = [Message(role="system", content=self.system), *example.messages[bool(own) :]]
            try:
                tokens = self.template.prompt(turns, example.tools)
            except RowError as error:
                raise UserError(f"{example.source}: with --model.teacher_system: {error}") from None
            if self.room is not None and len(tokens) > self.room:
                raise UserError(
                    f"{example.source}: with --model.teacher_system a prompt of {len(tokens)} tokens, which leaves the "
                    f"teacher no room to answer, {self.room} would; give a shorter one, or --data.max_length less"
                )
            self._tokens[row] = tokens
        return self._tokens[row]

    def student_budget(self, budget: int, answers: int) -> int:
        """Most tokens of a micro-batch, with the prompts of the policy, that has at most `budget` with the teacher's.

        Args:
            answers: most tokens of the responses to one prompt.

        Raises:
            UserError: one prompt with its answers is more for the teacher.
        """
        limit = budget
        for row, prompt in self._prompts.items():
            ours, theirs = len(prompt.tokens) + answers, len(self.tokens(row)) + answers
            if theirs > budget:
                raise UserError(
                    f"{prompt.example.source}: with --model.teacher_system a prompt with its answers may have {theirs} "
                    f"tokens but a micro-batch holds {budget}; set --data.max_tokens {theirs} or more"
                )
            limit = min(limit, budget * ours // theirs)
        return limit

    def seen(self, batch: Batch) -> Batch:
        """The responses of a batch after the prompts of the teacher.

        Raises:
            UserError: the batch is of a checkpoint, and its prompts are not those of the data any more.
        """
        rows, spans = batch.row.tolist(), [span for span in batch.structure() if span.responses]
        tokens = batch.tokens.tolist()
        for row, span in zip(rows, spans, strict=True):
            if row not in self._prompts or self._prompts[row].tokens != tokens[span.start : span.cut]:
                raise UserError(
                    "--model.teacher_system: the prompts are others than those of the checkpoint, which is from the "
                    "middle of a rollout; resume with the same --data.path, or from the end of a rollout"
                )
        return batch.with_prompts([self.tokens(row) for row in rows])
