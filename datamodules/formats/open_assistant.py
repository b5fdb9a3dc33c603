"""Messages of conversation trees, one a row, as OpenAssistant writes them (Köpf et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leyden.datamodules.formats.format import KINDS, Format, Parts, Rows
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.formats.turns import messages_of

_PATH, _ANSWERS, _BELOW = "messages from the root", "messages that answer it", "the message it answers"
"""Columns that `gather` adds: the rows before a prompt and itself, the rows that answer it, and for the answers."""
_NEEDS = ("message_id", "parent_id", "role", "text")


class OpenAssistant(Format):
    """message_id, parent_id, role, text, with rank (0 is best): each user message with the answers to it is an example.

    What comes before it in its tree is context. So every answer is read once, whichever way a conversation went on. The
    rows of a file are kept in memory, as a message may stand before the one that it answers.
    """

    name = "open-assistant"
    needs = _NEEDS
    optional = ("rank",)
    kinds = KINDS

    def gather(self, rows: Rows, kind: str, columns: Mapping[str, str]) -> Rows:
        messages, order = dict[Any, dict[str, Any]](), list[tuple[str, Any]]()
        answers: dict[Any, list[dict[str, Any]]] = {}
        for place, row in rows:
            if isinstance(row, RowError):
                yield place, row
                continue
            messages[row.get("message_id")] = row
            order.append((place, row.get("message_id")))
            answers.setdefault(row.get("parent_id"), []).append(row)
        for place, name in order:
            row = messages[name]
            try:
                path = _path(row, messages)
            except RowError as error:
                yield place, error
                continue
            below = answers.get(name, [])
            if row.get("role") == "assistant":
                if len(path) == 1:
                    yield place, RowError("an answer without a message that it answers; drop the row", "no prompt")
                continue
            yield place, {**row, _PATH: path, _ANSWERS: below}

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        for name in _NEEDS:
            row[name]
        if _PATH not in row:  # a row by itself
            return Parts(messages_of([_turn(row)], "text"))
        prompt = messages_of([_turn(one) for one in row[_PATH]], "text")
        answers = row[_ANSWERS]
        row.get("rank")
        if kind == "prompts":
            return Parts(prompt)
        if not answers:
            raise LeftOut("messages that nobody answered")
        parts = Parts(prompt, [messages_of([_turn(one)], "text") for one in answers])
        ranks = [one.get("rank") for one in answers]
        if None not in ranks:
            parts.worth = [-float(rank) for rank in ranks]
        if kind == "preference" and (parts.worth is None or len(answers) < 2):
            raise LeftOut("messages without two ranked answers")
        return parts


def _turn(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": row.get("role"), "content": row.get("text")}


def _path(row: dict[str, Any], messages: Mapping[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows from the root of a tree to this one. Raises `RowError` where one of them is missing."""
    path = [row]
    while path[0].get("parent_id") not in (None, ""):
        parent = messages.get(path[0]["parent_id"])
        if parent is None:
            problem = f"it answers {path[0]['parent_id']!r}, which is not in the file; give whole trees or drop the row"
            raise RowError(problem, "not in a tree")
        if len(path) > len(messages):
            raise RowError("its parents go round in a circle; mend parent_id or drop the row", "not in a tree")
        path.insert(0, parent)
    return path
