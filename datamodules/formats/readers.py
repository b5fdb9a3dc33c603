"""How each format is read: a row under canonical column names -> the turns before the answers, and the answers.

Every reader takes the row and the kind of data it is read as (prompts are read from rows without answers too), is
pure, and raises `RowError`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from leyden.datamodules.formats.row_error import RowError
from leyden.datamodules.formats.turns import messages_of, text_of, turns_of, with_roles_split
from leyden.example import Message


@dataclass
class Parts:
    """What a format finds in a row: the turns before the answers, and the answers in the order of the row."""

    prompt: list[Message]
    responses: list[list[Message]] = field(default_factory=list)
    worth: list[float] | None = None
    """What each answer is worth, higher is better; None where they stand best first."""
    scores: list[float] | None = None
    """The label of each answer, where the row gives numbers whose differences mean something."""
    text: str | None = None
    """Plain text for continued pretraining; then there are no turns."""


def messages(row: dict[str, Any], kind: str) -> Parts:
    """messages[role, content]."""
    return _conversation(messages_of(row["messages"], "messages"), row, kind)


def sharegpt(row: dict[str, Any], kind: str) -> Parts:
    """conversations[from, value]."""
    return _conversation(messages_of(row["conversations"], "conversations"), row, kind)


def _conversation(turns: list[Message], row: dict[str, Any], kind: str) -> Parts:
    turns = with_system(turns, row)
    if kind == "prompts":
        return Parts(turns)
    prompt, response = with_roles_split(turns)
    if not response:
        raise RowError("no assistant turn: nothing to train; add the answer or drop the row", "no answer")
    return Parts(prompt, [response])


def alpaca(row: dict[str, Any], kind: str) -> Parts:
    """instruction, input, output, with history (not trained) and system where they are there."""
    text = text_of(row["instruction"], "instruction", "user")
    if row.get("input") not in (None, ""):
        text = f"{text}\n\n{text_of(row['input'], 'input')}"
    turns = [*_history(row.get("history")), Message(role="user", content=text)]
    return Parts(with_system(turns, row), [answer(row, "output")] if kind != "prompts" else [])


def prompt_response(row: dict[str, Any], kind: str) -> Parts:
    """prompt, response: texts or turns."""
    prompt = with_system([*_history(row.get("history")), *turns_of(row["prompt"], "prompt", "user")], row)
    return Parts(prompt, [answer(row, "response")] if kind != "prompts" else [])


def input_output(row: dict[str, Any], kind: str) -> Parts:
    """input, output without an instruction."""
    prompt = with_system(turns_of(row["input"], "input", "user"), row)
    return Parts(prompt, [answer(row, "output")] if kind != "prompts" else [])


def text(row: dict[str, Any], kind: str) -> Parts:
    """Plain text."""
    return Parts([], text=text_of(row["text"], "text"))


def prompt_only(row: dict[str, Any], kind: str) -> Parts:
    """prompt: a text or turns."""
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
