"""The turns of a chat, and the prompt made from those that fit the model's positions."""

from __future__ import annotations

import json
from bisect import bisect_left
from pathlib import Path

from leyden.data.chat_template import ChatTemplate
from leyden.errors import RowError, UserError
from leyden.example import Message


class Conversation:
    """Alternating turns of a user and a model, after an optional system prompt.

    Args:
        template: the chat template, which makes prompts from turns.
        positions: number of the model's positions, in tokens; None for no limit.
        room: tokens reserved for an answer, at most a quarter of all positions.
        system: the system prompt; empty for none.
    """

    def __init__(self, template: ChatTemplate, positions: int | None, room: int, system: str = "") -> None:
        self.template, self.positions = template, positions
        self.room = room if positions is None else min(room, positions // 4)
        self.system = ""
        self.turns: list[Message] = []
        self.first = 0
        """Index of the first turn in the prompt; earlier turns no longer fit."""
        self.direct(system)

    def direct(self, system: str) -> None:
        """Set or remove the system prompt.

        Raises:
            UserError: the template has no place for a system prompt; the old one stays.
        """
        if system:
            question = Message(role="user", content="?")
            try:
                self.template.prompt([Message(role="system", content=system), question])
            except RowError as error:
                raise UserError(f"system prompt: {error.args[0].partition(';')[0]}; leave it out") from None
        self.system = system

    def clear(self) -> None:
        """Delete all turns; the system prompt stays."""
        self.turns, self.first = [], 0

    def ask(self, words: str) -> tuple[list[int], int]:
        """Add a question.

        Returns:
            The prompt's token ids, and the number of turns that it newly leaves out.

        Raises:
            UserError: no position is left for an answer even without the earlier turns.
        """
        self.turns.append(Message(role="user", content=words))
        return self._prompt()

    def answer(self, words: str) -> None:
        """Add the model's answer; if it is empty, take back the question."""
        if words:
            self.turns.append(Message(role="assistant", content=words))
        else:
            self.turns.pop()

    def again(self) -> tuple[list[int], int]:
        """Take back the last answer, and return its prompt as `ask` does. UserError if there is none."""
        if not self.turns:
            raise UserError("nothing was answered yet; ask something first")
        self.turns.pop()
        return self._prompt()

    def _prompt(self) -> tuple[list[int], int]:
        previous_first = self.first
        prompt = self._ids(self.first)
        if not self._fits(prompt):
            starts = range(self.first, len(self.turns), 2)  # the longest end that fits, or else the question alone
            self.first = starts[min(bisect_left(starts, True, key=self._fits_from), len(starts) - 1)]
            prompt = self._ids(self.first)
        if self.positions is not None and len(prompt) >= self.positions:
            self.turns.pop()
            raise UserError(
                f"this takes {len(prompt):,} tokens and the model has positions for {self.positions:,}; shorten it"
            )
        return prompt, self.first - previous_first

    def _fits_from(self, first: int) -> bool:
        return self._fits(self._ids(first))

    def _fits(self, prompt: list[int]) -> bool:
        return self.positions is None or len(prompt) + self.room <= self.positions

    def _ids(self, first: int) -> list[int]:
        system = [Message(role="system", content=self.system)] if self.system else []
        try:
            return self.template.prompt([*system, *self.turns[first:]])
        except RowError as error:
            self.turns.pop()
            raise UserError(f"{error.args[0].partition(';')[0]}; /new starts over") from None

    def save(self, file: Path) -> int:
        """Append the conversation to a file as a row of instruction data, `{"messages": […]}`.

        Returns:
            The number of turns.

        Raises:
            UserError: there are no turns yet, or the file cannot be written.
        """
        if not self.turns:
            raise UserError("nothing was answered yet, so there is nothing to save; ask something first")
        system = [Message(role="system", content=self.system)] if self.system else []
        try:
            with file.expanduser().open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"messages": [*system, *self.turns]}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror or error}); name another file") from None
        return len(self.turns)
