"""Messages of conversation trees, one a row, as OpenAssistant writes them (Köpf et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leyden.datamodules.formats.format import KINDS, Format, Parts, Rows
from leyden.datamodules.formats.not_read import is_empty
from leyden.datamodules.formats.preference_readers import finite
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.formats.turns import ROLES, messages_of

_PATH, _ANSWERS = "messages from the root", "messages that answer it"
"""Columns that `gather` adds to the row of a user message."""
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
        """A row for each message that is no answer, with the rows on the way to it and those that answer it."""
        messages, places = dict[str, dict[str, Any]](), dict[str, str]()
        answers: dict[str, list[dict[str, Any]]] = {}
        for place, row in rows:
            if isinstance(row, RowError):
                yield place, row
                continue
            name = str(row.get("message_id"))
            if name in messages:
                yield place, RowError(f"a second message_id {name!r}; give each its own or drop the row", "same id")
                continue
            messages[name], places[name] = row, place
            if _is_answer(row):
                answers.setdefault(str(row.get("parent_id")), []).append(row)
        for name, row in messages.items():
            try:
                path = _path(row, messages)
                if not _is_answer(row):
                    yield places[name], {**row, _PATH: path, _ANSWERS: answers.get(name, [])}
                elif len(path) == 1 or _is_answer(path[-2]):
                    raise RowError(
                        "an answer that answers no user message; mend parent_id or drop the row", "no prompt"
                    )
            except RowError as error:
                yield places[name], error

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
            parts.worth = [-finite(rank, "rank") for rank in ranks]
        if kind == "preference" and (parts.worth is None or len(answers) < 2):
            raise LeftOut("messages without two ranked answers")
        return parts


def _turn(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": row.get("role"), "content": row.get("text")}


def _is_answer(row: Mapping[str, Any]) -> bool:
    return ROLES.get(str(row.get("role")).strip().lower()) == "assistant"


def _path(row: dict[str, Any], messages: Mapping[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows from the root of a tree to this one. Raises `RowError` where one of them is missing."""
    path = [row]
    while not is_empty(path[0].get("parent_id")):
        parent = messages.get(str(path[0]["parent_id"]))
        if parent is None:
            problem = f"it answers {path[0]['parent_id']!r}, which is not in the file; give whole trees or drop the row"
            raise RowError(problem, "not in a tree")
        if len(path) > len(messages):
            raise RowError("its parents go round in a circle; mend parent_id or drop the row", "not in a tree")
        path.insert(0, parent)
    return path
