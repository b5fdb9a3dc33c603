"""Formats of instruction, text and prompt rows. Each names its columns and reads a row."""

from __future__ import annotations

from typing import Any

from leyden.datamodules.formats.format import Format, Parts
from leyden.datamodules.formats.row_error import RowError
from leyden.datamodules.formats.turns import messages_of, split_at_answer, text_of, turns_of
from leyden.example import Message


class Messages(Format):
    """messages[role, content]."""

    name = "messages"
    needs = ("messages",)

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        return _conversation(messages_of(row["messages"], "messages"), row, kind)


class ShareGPT(Format):
    """conversations[from, value]."""

    name = "sharegpt"
    needs = ("conversations",)

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        return _conversation(messages_of(row["conversations"], "conversations"), row, kind)


def _conversation(turns: list[Message], row: dict[str, Any], kind: str) -> Parts:
    turns = with_system(turns, row)
    if kind == "prompts":
        return Parts(turns)
    prompt, response = split_at_answer(turns)
    if not response:
        raise RowError("no assistant turn: nothing to train; add the answer or drop the row", "no answer")
    return Parts(prompt, [response])


class Alpaca(Format):
    """instruction, input, output, with history (not trained) and system where they are there."""

    name = "alpaca"
    needs = ("instruction", "output")
    answers = ("output",)

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        text = text_of(row["instruction"], "instruction", "user")
        if row.get("input") not in (None, ""):
            text = f"{text}\n\n{text_of(row['input'], 'input')}"
        turns = [*_history(row.get("history")), Message(role="user", content=text)]
        return Parts(with_system(turns, row), [answer(row, "output")] if kind != "prompts" else [])


class PromptResponse(Format):
    """prompt, response: texts or turns."""

    name = "prompt-response"
    needs = ("prompt", "response")
    answers = ("response",)

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        prompt = with_system([*_history(row.get("history")), *turns_of(row["prompt"], "prompt", "user")], row)
        return Parts(prompt, [answer(row, "response")] if kind != "prompts" else [])


class InputOutput(Format):
    """input, output without an instruction."""

    name = "input-output"
    needs = ("input", "output")
    answers = ("output",)

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        prompt = with_system(turns_of(row["input"], "input", "user"), row)
        return Parts(prompt, [answer(row, "output")] if kind != "prompts" else [])


class Text(Format):
    """Plain text."""

    name = "text"
    needs = ("text",)
    kinds = ("instruction",)

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        return Parts([], text=text_of(row["text"], "text"))


class PromptOnly(Format):
    """prompt: a text or turns."""

    name = "prompt"
    needs = ("prompt",)
    kinds = ("prompts",)

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        return Parts(with_system(turns_of(row["prompt"], "prompt", "user"), row))


def answer(row: dict[str, Any], name: str) -> list[Message]:
    """The turns of a column that holds an answer."""
    return turns_of(row[name], name, "assistant")


def with_system(turns: list[Message], row: dict[str, Any]) -> list[Message]:
    """Turns with the row's system column before them, unless they have a system turn."""
    system = row.get("system")
    if system in (None, "") or (turns and turns[0]["role"] == "system"):
        return turns
    return [Message(role="system", content=text_of(system, "system")), *turns]


def _history(history: Any) -> list[Message]:
    """Earlier turns of an Alpaca row: a list of [question, answer] pairs."""
    turns: list[Message] = []
    for number, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            problem = "'history' must be a list of [question, answer] pairs; mend it or drop the column"
            raise RowError(problem, "bad history")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role=role, content=text_of(text, f"history[{number}]", role)))
    return turns
