"""The turns of a chat, and those of them that a model still has positions for."""

from __future__ import annotations

import json
from pathlib import Path

from leyden.data.chat_template import ChatTemplate
from leyden.errors import RowError, UserError
from leyden.example import Message


class Conversation:
    """Turns of a user and a model, in turn, after a system prompt if there is one.

    Args:
        template: makes prompts of turns.
        positions: tokens that the model has positions for; None is no limit.
        room: tokens of an answer; so many are kept free, as far as that is not more than a quarter of all positions.
        system: the system prompt; empty for none.
    """

    def __init__(self, template: ChatTemplate, positions: int | None, room: int, system: str = "") -> None:
        self.template, self.positions = template, positions
        self.room = room if positions is None else min(room, positions // 4)
        self.system = ""
        self.turns: list[Message] = []
        self.first = 0
        """The first turn that the model sees; those before no longer fit."""
        self.direct(system)

    def direct(self, system: str) -> None:
        """Put another system prompt before the turns, or none. UserError, and no change, if the template has no place
        for one."""
        if system:
            question = Message(role="user", content="?")
            try:
                self.template.prompt([Message(role="system", content=system), question])
            except RowError as error:
                raise UserError(f"system prompt: {error.args[0].partition(';')[0]}; leave it out") from None
        self.system = system

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns, self.first = [], 0

    def ask(self, words: str) -> tuple[list[int], int]:
        """Add a question: the prompt to answer, in tokens, and how many turns had to be left out of it just now.

        Raises:
            UserError: there is no position left for an answer even without the turns before.
        """
        self.turns.append(Message(role="user", content=words))
        return self._prompt()

    def answer(self, words: str) -> None:
        """Add what the model said; where it said nothing at all, take the question back."""
        if words:
            self.turns.append(Message(role="assistant", content=words))
        else:
            self.turns.pop()

    def again(self) -> tuple[list[int], int]:
        """Take back the last answer: the prompt that it answered. UserError if there is none."""
        if not self.turns:
            raise UserError("nothing was answered yet; ask something first")
        self.turns.pop()
        return self._prompt()

    def _prompt(self) -> tuple[list[int], int]:
        before = self.first
        prompt = self._ids(self.first)
        while self.positions is not None and len(prompt) + self.room > self.positions:
            if self.first + 2 >= len(self.turns):
                break
            self.first += 2
            prompt = self._ids(self.first)
        if self.positions is not None and len(prompt) >= self.positions:
            self.turns.pop()
            raise UserError(
                f"this takes {len(prompt):,} tokens and the model has positions for {self.positions:,}; shorten it"
            )
        return prompt, self.first - before

    def _ids(self, first: int) -> list[int]:
        system = [Message(role="system", content=self.system)] if self.system else []
        try:
            return self.template.prompt([*system, *self.turns[first:]])
        except RowError as error:
            self.turns.pop()
            raise UserError(f"{error.args[0].partition(';')[0]}; /new starts over") from None

    def save(self, file: Path) -> int:
        """Append all turns to a file as a row of instruction data, `{"messages": […]}`; how many turns.

        Raises:
            UserError: there are none yet, or the file cannot be written.
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
