"""Formats of instruction, text and prompt rows. Each names its columns and reads a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leyden.datamodules.formats.format import Format, Parts
from leyden.datamodules.formats.not_read import is_empty, name_the_rest
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.formats.turns import messages_of, split_at_answer, text_of, turns_of
from leyden.example import Message

AROUND = ("context", "system")
_ABOVE = ("instruction", "context")
BESIDE = ("instruction", "context", "input", "history", "system")
"""Columns that belong to the prompt of a row beside the one that asks."""


class Messages(Format):
    """messages[role, content]."""

    name = "messages"
    needs = ("messages",)
    optional = AROUND

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        return _conversation(messages_of(row["messages"], "messages"), row, kind)


class ShareGPT(Format):
    """conversations[from, value]."""

    name = "sharegpt"
    needs = ("conversations",)
    optional = AROUND

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        return _conversation(messages_of(row["conversations"], "conversations"), row, kind)


def _conversation(turns: list[Message], row: dict[str, Any], kind: str) -> Parts:
    turns = around(turns, row)
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
    optional = ("context", "input", "history", "system")

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        turns = asked(row, "instruction", above=("context",))
        return Parts(turns, [answer(row, "output")] if kind != "prompts" else [])


class PromptResponse(Format):
    """prompt, response: texts or turns; with instruction, context and input where they are there."""

    name = "prompt-response"
    needs = ("prompt", "response")
    answers = ("response",)
    optional = BESIDE

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        return Parts(asked(row), [answer(row, "response")] if kind != "prompts" else [])


class InputOutput(Format):
    """input, output without an instruction."""

    name = "input-output"
    needs = ("input", "output")
    answers = ("output",)
    optional = ("instruction", "context", "history", "system")

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        return Parts(asked(row, "input"), [answer(row, "output")] if kind != "prompts" else [])


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
    optional = BESIDE

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        return Parts(asked(row))


class Squad(Format):
    """context, prompt, answers{text[…]}: the first of the answers is trained."""

    name = "squad"
    needs = ("prompt", "responses")
    answers = ("responses",)
    optional = BESIDE
    kinds = ("instruction", "prompts")

    def told(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        return all(isinstance(row["responses"], dict) and "text" in row["responses"] for row in rows)

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        turns = asked(row)
        if kind == "prompts":
            return Parts(turns)
        texts = row["responses"].get("text") if isinstance(row["responses"], dict) else None
        if not isinstance(texts, list):
            raise RowError("'answers' is not {'text': […]}; write the answers so, or drop the row", "bad answers")
        if not texts:
            raise LeftOut("questions without an answer")
        name_the_rest(row["responses"], ("text",), "answers.")
        responses = [turns_of(text, f"answers.text[{number}]", "assistant") for number, text in enumerate(texts)]
        return Parts(turns, [one for number, one in enumerate(responses) if one not in responses[:number]])


def answer(row: dict[str, Any], name: str) -> list[Message]:
    """The turns of a column that holds an answer."""
    return turns_of(row[name], name, "assistant")


def asked(row: dict[str, Any], name: str = "prompt", above: Sequence[str] = _ABOVE) -> list[Message]:
    """The turns of a prompt with everything in the row that belongs to it: the system text, earlier turns, and in the
    question itself instruction and context above it and input below it, unless it has their text already."""
    value = row[name]
    turns = value
    if isinstance(value, dict) and "messages" in value:
        name_the_rest(value, ("messages", "tools"), f"{name}.")  # `tools_beside` has the tools
        turns = value["messages"]
    turns = [*_history(row.get("history")), *turns_of(turns, name, "user")]
    others = [other for other in (*above, "input") if dict.get(row, other) is not value]  # one may stand for the prompt
    over, under = [o for o in others if o != "input"], [o for o in others if o == "input"]
    return with_system(_with_beside(turns, row, over, under), row)


def around(turns: list[Message], row: dict[str, Any]) -> list[Message]:
    """The turns of a conversation with what stands beside it: the system text, and a context above its first turn."""
    return with_system(_with_beside(turns, row, ["context"], [], first=True), row)


def _with_beside(
    turns: list[Message], row: dict[str, Any], above: Sequence[str], below: Sequence[str], first: bool = False
) -> list[Message]:
    """Turns with columns of the row above and below the text of the last user turn, or of the first."""
    over, under = ([text for name in names if (text := _beside(row, name))] for names in (above, below))
    users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    if not over and not under:
        return turns
    if not users:
        problem = f"no user turn that could hold '{[*above, *below][0]}'; write it into a turn, or drop the column"
        raise RowError(problem, "no prompt")
    at = users[0 if first else -1]
    question = turns[at].copy()
    over, under = ([text for text in texts if not _stands_in(text, question["content"])] for texts in (over, under))
    question["content"] = "\n\n".join([*over, question["content"], *under])
    return [*turns[:at], question, *turns[at + 1 :]]


def _beside(row: dict[str, Any], name: str) -> str:
    """The text of a column beside the question, or several in a list. A context of another shape is only named."""
    value = dict.get(row, name)  # looked at, but not yet taken
    if is_empty(value) or (name == "context" and not isinstance(value, str) and not _is_texts(value)):
        return ""
    texts = row[name] if _is_texts(value) else [row[name]]
    return "\n\n".join(text_of(text, name) for text in texts if not is_empty(text))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _stands_in(text: str, question: str) -> bool:
    """Whether a question has a text already: as whole lines, or anywhere if it is too long to be there by chance."""
    text = text.strip()
    return f"\n{text}\n" in f"\n{question}\n" or (len(text) > 40 and text in question)


def with_system(turns: list[Message], row: dict[str, Any]) -> list[Message]:
    """Turns with the row's system column before them. Raises `RowError` where they begin with another system turn."""
    system = row.get("system")
    if is_empty(system):
        return turns
    text = text_of(system, "system")
    if not turns or turns[0]["role"] != "system":
        return [Message(role="system", content=text), *turns]
    if turns[0]["content"].strip() != text.strip():
        problem = "the column 'system' is not the system turn of the conversation; keep one of them"
        raise RowError(problem, "two system texts")
    return turns


def _history(history: Any) -> list[Message]:
    """Earlier turns of an Alpaca row: a list of [question, answer] pairs."""
    turns: list[Message] = []
    for number, pair in enumerate([] if is_empty(history) else history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            problem = "'history' must be a list of [question, answer] pairs; mend it or drop the column"
            raise RowError(problem, "bad history")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role=role, content=text_of(text, f"history[{number}]", role)))
    return turns
