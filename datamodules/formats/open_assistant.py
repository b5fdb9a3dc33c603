"""Messages of conversation trees, one a row, as OpenAssistant writes them (Köpf et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leyden.datamodules.formats.columns import names_of
from leyden.datamodules.formats.format import KINDS, Format, Parts, Rows
from leyden.datamodules.formats.not_read import is_empty, name_the_rest
from leyden.datamodules.formats.preference_readers import finite
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.formats.turns import ROLES, messages_of

_PATH, _ANSWERS = "messages from the root", "messages that answer it"
"""Columns that `gather` adds to the row of a user message."""
_REST = "columns that are not read"
_NEEDS = ("message_id", "parent_id", "role", "text")


class OpenAssistant(Format):
    """message_id, parent_id, role, text, with rank (0 is best): each user message with the answers to it is an example.

    What comes before it in its tree is context. So every answer is read once, whichever way a conversation went on. The
    rows of a file are kept in memory, as a message may stand before the one that it answers.
    """

    name = "open-assistant"
    needs = _NEEDS
    optional = ("rank", "deleted")
    kinds = KINDS

    def gather(self, rows: Rows, kind: str, columns: Mapping[str, str]) -> Rows:
        """A row for each message that is no answer, with the rows on the way to it and those that answer it."""
        messages, found = dict[str, dict[str, Any]](), dict[str, tuple[str, dict[str, Any]]]()
        answers: dict[str, list[dict[str, Any]]] = {}
        for place, row in rows:
            if isinstance(row, RowError):
                yield place, row
                continue
            message = _message(row, columns)
            name = str(message["message_id"])
            if is_empty(message["message_id"]):
                yield place, RowError("'message_id' is empty; give each message its own or drop the row", "no id")
            elif name in messages:
                yield place, RowError(f"a second message_id {name!r}; give each its own or drop the row", "same id")
            else:
                messages[name], found[name] = message, (place, row)
                if _is_answer(message) and not _is_deleted(message):
                    answers.setdefault(str(message["parent_id"]), []).append(message)
        for name, message in messages.items():
            place, row = found[name]
            try:
                path = _path(message, messages)
                if not _is_answer(message) or _is_deleted(message):
                    yield place, {**row, _PATH: path, _ANSWERS: answers.get(name, [])}
                elif len(path) == 1 or _is_answer(path[-2]):
                    raise RowError(
                        "an answer that answers no user message; mend parent_id or drop the row", "no prompt"
                    )
            except RowError as error:
                yield place, error

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        for name in _NEEDS:
            row[name]
        if _PATH not in row:  # a row by itself
            return Parts(messages_of([_turn(row)], "text"))
        row.get("deleted")
        if any(map(_is_deleted, row[_PATH])):
            raise LeftOut("messages that are deleted, or behind one that is")
        prompt = messages_of([_turn(one) for one in row[_PATH]], "text")
        answers = row[_ANSWERS]
        row.get("rank")
        if kind == "prompts":
            return Parts(prompt)
        if not answers:
            raise LeftOut("messages that nobody answered")
        parts = Parts(prompt, [messages_of([_turn(one)], "text") for one in answers])
        for one in answers:
            name_the_rest(one[_REST], ())
        ranks = [one["rank"] for one in answers]
        if None not in ranks:
            parts.worth = [-finite(rank, "rank") for rank in ranks]
        if kind in ("preference", "unpaired") and (parts.worth is None or len(answers) < 2):
            raise LeftOut("messages without two ranked answers")
        return parts


def _message(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """What is read of a row under canonical names, and the rest of it under its own."""
    names = names_of(row, columns)
    read = {name: names[name] for name in (*_NEEDS, "rank", "deleted") if name in names}
    message = {name: row.get(read.get(name, "")) for name in (*_NEEDS, "rank", "deleted")}
    return {**message, _REST: {name: value for name, value in row.items() if name not in read.values()}}


def _is_deleted(message: Mapping[str, Any]) -> bool:
    return str(message["deleted"]).strip().lower() in ("true", "1", "1.0", "yes")


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
