"""Rows to examples: every format is a pure function with a name, a test for its columns, and one clear error a trap.

Column names are matched without regard to case, and a few obvious ones stand for each other (question and 질문 for
prompt, answer and 답변 for response); `columns={"prompt": "my column"}` maps any other name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from leyden.datamodules.formats import preference_readers, readers
from leyden.datamodules.formats.columns import canonical, check_columns, names_of
from leyden.datamodules.formats.ranking import best_first
from leyden.datamodules.formats.readers import Parts
from leyden.datamodules.formats.row_error import RowError
from leyden.datamodules.formats.turns import check_order
from leyden.errors import UserError, nearest
from leyden.example import Example

__all__ = ["FORMATS", "KINDS", "RowError", "describe", "detect", "parse"]

Row = Mapping[str, Any]
KINDS = ("instruction", "preference", "prompts", "candidates")
"""What rows can be read as: an answer to train on, responses to compare, prompts alone, or responses to score."""


@dataclass(frozen=True)
class Format:
    """One way to write a row. `needs` are its columns; for prompts alone those of `answers` may be missing."""

    name: str
    needs: tuple[str, ...]
    answers: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Parts]
    """(row under canonical names, kind) -> parts."""

    def fits(self, names: Iterable[str], answers: bool = True) -> bool:
        """Whether a row with these canonical columns can be read."""
        return set(self.reads(answers)) <= set(names)

    def reads(self, answers: bool = True) -> tuple[str, ...]:
        """The columns that are read, with or without the answers."""
        return self.needs if answers else tuple(name for name in self.needs if name not in self.answers)


def parse(
    row: Row,
    format: str,
    kind: str,
    columns: Mapping[str, str] | None = None,
    rank_order: str | None = None,
) -> Example:
    """One row as an example of `kind`; raises `RowError`. Pure.

    `columns` maps canonical names to the row's own (`{"prompt": "질문"}`). `rank_order` is `lower_is_better` or
    `higher_is_better` and needed where a row only ranks its completions. Responses to compare stand best first,
    candidates in the order of the row.
    """
    form = _form(format, kind)
    named = canonical(row, columns or {})
    if rank_order is not None:
        named["rank_order"] = rank_order
    _require(form, named, row, columns or {}, answers=kind != "prompts")
    parts = form.read(named, kind)
    if parts.text is not None:
        return Example([], text=parts.text, row=row)
    return _finish(parts, kind, row)


def detect(rows: Sequence[Row], kind: str, columns: Mapping[str, str] | None = None) -> str:
    """The name of the format that most of the first `rows` are written in; raises `UserError` when none fits.

    Where two fit equally well the earlier in `FORMATS` wins; for prompts, one whose answers are there wins.
    """
    if not rows:
        raise UserError("no rows to find the format from; give a file with data")
    check_columns(rows, columns or {})
    names = [names_of(row, columns or {}) for row in rows]
    best, most = "", 0
    for answers, form in product((True, False) if kind == "prompts" else (True,), FORMATS[kind].values()):
        votes = sum(form.fits(one, answers) for one in names)
        if votes > most:
            best, most = form.name, votes
    if most == 0:
        raise UserError(_no_format(rows[0], kind))
    return best


def describe(rows: Sequence[Row], format: str, kind: str, columns: Mapping[str, str] | None = None) -> str:
    """One line that says how rows are read: `prompt-response (prompt: 질문, response: 답변)`."""
    check_columns(rows, columns or {})
    form, found = _form(format, kind), names_of(rows[0], columns or {})
    reads = form.reads(answers=kind != "prompts")
    uses = [f"{name}: {found[name]}" if found[name] != name else name for name in reads if name in found]
    return f"{form.name} ({', '.join(uses)})"


def _finish(parts: Parts, kind: str, row: Row) -> Example:
    if kind == "prompts":
        turns = list(parts.prompt)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        check_order(turns)
        if not turns or turns[-1]["role"] not in ("user", "tool"):
            raise RowError("there is no user turn to answer; write a prompt or drop the row", "no prompt")
        return Example(turns, row=row)
    responses, worth = parts.responses, parts.worth
    if kind == "instruction":
        responses = [responses[worth.index(max(worth)) if worth else 0]]
    for response in responses:
        check_order([*parts.prompt, *response])
        if response[-1]["role"] != "assistant":
            problem = f"the last turn is {response[-1]['role']}, not assistant: nothing to train; drop that turn"
            raise RowError(problem, "no answer")
    if kind != "preference":
        return Example(parts.prompt, responses, row=row)
    kept = best_first(responses, worth)
    scores = parts.scores and [parts.scores[number] for number in kept]
    left_out = len(responses) - len(kept)
    return Example(parts.prompt, [responses[number] for number in kept], scores, row=row, left_out=left_out)


_INSTRUCTION = (
    Format("messages", ("messages",), (), readers.messages),
    Format("alpaca", ("instruction", "output"), ("output",), readers.alpaca),
    Format("prompt-response", ("prompt", "response"), ("response",), readers.prompt_response),
    Format("input-output", ("input", "output"), ("output",), readers.input_output),
    Format("sharegpt", ("conversations",), (), readers.sharegpt),
    Format("text", ("text",), ("text",), readers.text),
)
_PAIR = (
    Format("prompt-chosen-rejected", ("prompt", "chosen", "rejected"), ("chosen", "rejected"), preference_readers.pair),
    Format(
        "sharegpt-chosen-rejected",
        ("conversations", "chosen", "rejected"),
        ("chosen", "rejected"),
        preference_readers.sharegpt_pair,
    ),
    Format("chosen-rejected", ("chosen", "rejected"), (), preference_readers.transcripts),
)
_RANKED = ("prompt", "completion_0", "completion_1")
_PREFERENCE = (
    *_PAIR,
    Format("ranked", (*_RANKED, "ranking"), ("ranking",), preference_readers.ranked),
    Format(
        "ranked-columns", (*_RANKED, "ranking_0", "ranking_1"), ("ranking_0", "ranking_1"), preference_readers.ranked
    ),
    Format("scored", ("prompt", "responses", "scores"), ("responses", "scores"), preference_readers.scored),
)
_UNRANKED = (
    Format("ranked", ("prompt", "completion_0"), (), preference_readers.ranked),
    Format("ranked-columns", ("prompt", "completion_0"), (), preference_readers.ranked),
    Format("scored", ("prompt", "responses"), (), preference_readers.scored),
)
_PROMPTS = (Format("prompt", ("prompt",), (), readers.prompt_only),)


def _by_name(*formats: Format) -> dict[str, Format]:
    return {form.name: form for form in formats}


FORMATS: dict[str, dict[str, Format]] = {
    "instruction": _by_name(*_PREFERENCE, *_INSTRUCTION),
    "preference": _by_name(*_PREFERENCE),
    "prompts": _by_name(*_PREFERENCE, *_INSTRUCTION[:-1], *_PROMPTS),
    "candidates": _by_name(*_PAIR, *_UNRANKED, *_INSTRUCTION[:-1]),
}
"""kind -> name -> format, in order of precedence. Every kind also reads the richer ones and leaves out the rest."""


def _form(name: str, kind: str) -> Format:
    if kind not in FORMATS:
        raise UserError(f"kind {kind}: unknown{nearest(kind, KINDS) or '; use ' + ', '.join(KINDS)}")
    if name not in FORMATS[kind]:
        known = ", ".join(FORMATS[kind])
        raise UserError(f"format {name}: unknown for {kind} data{nearest(name, FORMATS[kind]) or '; use ' + known}")
    return FORMATS[kind][name]


def _no_format(row: Row, kind: str) -> str:
    found = ", ".join(map(str, row)) or "none"
    known = " | ".join(",".join(form.needs) for form in FORMATS[kind].values())
    names = ("chosen", "rejected") if kind == "preference" else ("prompt", "response")
    flags = " ".join(f"--{name} COLUMN" for name in names)
    mapping = ", ".join(f"{name}: COLUMN" for name in names)
    return (
        f"no {kind} format fits the columns {found}; name them with {flags} (leyden data) or "
        f"--data.columns '{{{mapping}}}' (leyden fit), or use one of {known}"
    )


def _require(form: Format, named: Mapping[str, Any], row: Row, columns: Mapping[str, str], answers: bool) -> None:
    for name in form.reads(answers):
        if name not in named:
            column = columns.get(name, name)
            hint = nearest(column, map(str, row)) or f"; the row has {', '.join(map(str, row)) or 'no columns'}"
            raise RowError(f"no column '{column}' ({form.name}){hint}", f"no {name}")
