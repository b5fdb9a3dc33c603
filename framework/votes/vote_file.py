"""votes.jsonl: votes with their items, a line each, to be read without the database that they come from."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from leyden.atomic import write_whole
from leyden.errors import UserError
from leyden.votes.ballots import check
from leyden.votes.vote import Answer, Item, Vote, current

SQLITE = b"SQLite format 3\x00"


def write_votes(items: Sequence[Item], votes: Sequence[Vote], file: Path) -> int:
    """Write the current votes, the oldest first, and return how many there are. Votes for items that are not among
    `items` cannot be written; an item without a vote is in no line.

    Raises:
        UserError: the file cannot be written.
    """
    by_id = {item.id: item for item in items}
    lines = [_line(vote, by_id[vote.item]) for vote in current(votes) if vote.item in by_id]
    try:
        write_whole(file, "".join(lines))
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); name another file") from error
    return len(lines)


def _line(vote: Vote, item: Item) -> str:
    told = asdict(vote)
    told["item"] = {
        "messages": [dict(message) for message in item.messages],
        "answers": list(map(asdict, item.answers)),
    }
    text = json.dumps(told, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which UTF-8 has no bytes for
        text = json.dumps(told)
    return text + "\n"


def read_votes(file: Path) -> tuple[list[Item], list[Vote]]:
    """The items of a votes.jsonl, each once, and its votes.

    Raises:
        UserError: the file is missing or is no votes.jsonl, or a line is not whole, as `file:line: …`.
    """
    items, votes = dict[str, Item](), list[Vote]()
    for place, row in _rows(file):
        try:
            item, vote = _read(row)
            kept = items.setdefault(item.id, item)
            check(vote, item)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{place}: not a vote with its item ({problem}); mend or remove the line") from error
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        votes.append(replace(vote, item=kept.id, ranks=_in_order(vote.ranks, item, kept)))
    return list(items.values()), votes


def _rows(file: Path) -> Iterable[tuple[str, Any]]:
    if not file.is_file():
        raise UserError(f"{file}: no such file; leyden annotate export writes one")
    with file.open("rb") as stream:
        if stream.read(len(SQLITE)) == SQLITE:
            raise UserError(
                f"{file}: the database of leyden annotate; write its votes to a file of their own first: "
                f"leyden annotate export {file} votes.jsonl --kind votes"
            )
    with file.open(encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"{file}:{number}", json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}:{number}: not whole JSON; mend or remove the line") from error


def _read(row: Mapping[str, Any]) -> tuple[Item, Vote]:
    asked = row["item"]
    answers = tuple(
        Answer(str(answer["text"]), str(answer.get("model") or ""), _number(answer.get("score")),
               _number(answer.get("spread")))
        for answer in asked["answers"]
    )  # fmt: skip
    messages = asked["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("'messages' is no list of turns")
    item = Item(tuple(messages), answers)
    ranks, all_bad = tuple(row.get("ranks") or ()), bool(row.get("all_bad"))
    vote = Vote(item.id, str(row["person"]), float(row["time"]), ranks, all_bad, str(row.get("reason") or ""))
    return item, vote


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _in_order(ranks: tuple[int, ...], item: Item, kept: Item) -> tuple[int, ...]:
    """Ranks of an item's answers in the order in which another copy of the item has them."""
    if not ranks or item.answers == kept.answers:
        return ranks
    places = defaultdict[tuple[str, str], list[int]](list)
    for rank, answer in zip(ranks, item.answers, strict=True):
        places[answer.text, answer.model].append(rank)
    return tuple(places[answer.text, answer.model].pop(0) for answer in kept.answers)
