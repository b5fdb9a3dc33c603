"""Formats of preferences as data sets of ratings write them: answers that are objects, scores of one row an answer, and
a number that says which of two is better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, ClassVar

from leyden.datamodules.formats.columns import names_of
from leyden.datamodules.formats.format import KINDS, Format, Parts, Rows
from leyden.datamodules.formats.not_read import holds_text, is_empty, name_the_rest
from leyden.datamodules.formats.preference_readers import NO_ORDER, SIGNS, Scored, finite, listed
from leyden.datamodules.formats.readers import BESIDE, answer, asked
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.formats.turns import turns_of

_TEXTS = ("response", "answer", "text", "content", "completion")
_SCORES = ("score", "overall_score", "rating", "reward", "rank")
_SHARED = ("prompt", *BESIDE, "tools")
"""Columns that are the same in the rows of one prompt."""


class ScoredObjects(Format):
    """prompt, responses[{response, score}]: each answer an object with its text and its score, or its rank."""

    name = "scored-objects"
    needs = ("prompt", "responses")
    answers = ("responses",)
    optional = BESIDE
    kinds = KINDS

    def told(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        return all(_objects(row["responses"]) for row in rows)

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        prompt = asked(row)
        if kind == "prompts":
            return Parts(prompt)
        objects = listed(row["responses"], "responses")
        if not _objects(objects):
            raise RowError("'responses' is not a list of objects with a text; write {'response': …, 'score': …}", "bad")
        text, score = _key(objects, _TEXTS), _key(objects, _SCORES)
        for one in objects:
            name_the_rest(one, {text, score}, "responses[].")
        parts = Parts(prompt, [turns_of(one.get(text), f"responses[].{text}", "assistant") for one in objects])
        if kind == "candidates":
            return parts
        if not score:
            problem = f"the answers have no score; write one of {', '.join(_SCORES)} beside each, or drop the row"
            raise RowError(problem, "scores missing")
        numbers = [finite(one.get(score), f"responses[].{score}") for one in objects]
        if score == "rank":
            if row.get("rank_order") not in SIGNS:
                raise RowError(NO_ORDER, "rank order not given")
            parts.worth = [SIGNS[row["rank_order"]] * number for number in numbers]
        else:
            parts.worth = parts.scores = numbers
        return parts


class ScoredRows(Scored):
    """prompt, response, score with one row an answer: rows that follow each other with one prompt are compared."""

    name = "scored-rows"
    needs = ("prompt", "response", "score")
    kinds = ("preference", "unpaired")

    def told(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether there are rows to compare: two that follow each other with one prompt, in any place."""
        return any(one["prompt"] == other["prompt"] for one, other in pairwise(rows))

    def gather(self, rows: Rows, kind: str, columns: Mapping[str, str]) -> Rows:
        """One row with the lists `responses` and `scores` for each prompt."""
        for _, same in groupby(rows, lambda item: _question(item, columns)):
            together = list(same)
            place, first = together[0]
            if isinstance(first, RowError):
                yield place, first
                continue
            group = [row for _, row in together if not isinstance(row, RowError)]
            named = [names_of(row, columns) for row in group]
            lists = {
                plural: [row.get(names.get(name, "")) for row, names in zip(group, named, strict=True)]
                for name, plural in (("response", "responses"), ("score", "scores"))
            }
            yield place, {**_with_columns_of_all(group, named), **lists}

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        if len(row.get("responses") or [row["response"]]) < 2:
            raise LeftOut("prompts with only one answer")
        row["response"], row["score"]  # they stand in the lists
        return super().read(row, kind)


class Strength(Format):
    """prompt, two answers, and a number that is below 0 where the first is better and above 0 where the second is."""

    asks: ClassVar[str] = "prompt"
    kinds = KINDS

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        names = [name for name in self.answers if name != self.answers[-1]]
        prompt = asked(row, self.asks)
        if kind == "prompts":
            return Parts(prompt)
        parts = Parts(prompt, [answer(row, name) for name in names])
        if kind != "candidates":
            strength = finite(row[self.answers[-1]], self.answers[-1])
            parts.worth = parts.scores = [-strength, 0.0]
        return parts


class HelpSteer3(Strength):
    """context, response1, response2, overall_preference, as in HelpSteer3 (Wang et al. 2025)."""

    name = "helpsteer3"
    asks = "context"
    needs = ("context", "response1", "response2", "overall_preference")
    answers = ("response1", "response2", "overall_preference")


class HelpSteer2Preference(Strength):
    """prompt, response_1, response_2, preference_strength, as in HelpSteer2-Preference (Wang et al. 2024)."""

    name = "helpsteer2-preference"
    needs = ("prompt", "response_1", "response_2", "preference_strength")
    answers = ("response_1", "response_2", "preference_strength")
    optional = BESIDE


def _question(item: tuple[str, dict[str, Any] | RowError], columns: Mapping[str, str]) -> Any:
    """What rows of one prompt share."""
    place, row = item
    if isinstance(row, RowError):
        return place
    names = names_of(row, columns)
    return [row.get(names.get(name, "")) for name in _SHARED]


def _with_columns_of_all(rows: Sequence[Mapping[str, Any]], named: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The first of the rows of one prompt, with columns of the others that say nothing in it, or no words: they are
    not read, and are named with it."""
    found = dict(rows[0])
    for row, names in zip(rows, named, strict=True):
        read = {names.get(name) for name in (*_SHARED, "response", "score")}
        for column, value in row.items():
            own = found.get(column)
            if column not in read and (is_empty(own) or (holds_text(value) and not holds_text(own))):
                found[column] = value
    return found


def _objects(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(one, dict) and _key([one], _TEXTS) for one in value)
    )


def _key(objects: Iterable[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The first of the names that all objects have, or nothing."""
    return next((name for name in names if all(not is_empty(one.get(name)) for one in objects)), "")
