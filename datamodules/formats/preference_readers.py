"""Formats of preference rows. Each names its columns and reads a row: responses in the order of the row, and the worth
of each."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any, ClassVar

from leyden.datamodules.formats.format import KINDS, Format, Parts
from leyden.datamodules.formats.readers import AROUND, BESIDE, answer, around, asked
from leyden.datamodules.formats.row_error import RowError
from leyden.datamodules.formats.turns import is_transcript, messages_of, normalised_turns, turns_of
from leyden.example import Message

NO_ORDER = (
    "a ranking can be read both ways; say --data.rank_order lower_is_better where rank 1 is better than rank 2, else "
    "higher_is_better (leyden data: --rank-order)"
)
SCORES = ("score_chosen", "score_rejected", "margin")
"""Columns that say by how much a pair differs."""
SIGNS = {"lower_is_better": -1.0, "higher_is_better": 1.0}


class Pair(Format):
    """prompt, chosen, rejected: texts or turns; answers that repeat the conversation are read as transcripts."""

    name = "prompt-chosen-rejected"
    needs = ("prompt", "chosen", "rejected")
    answers = ("chosen", "rejected")
    optional = (*BESIDE, *SCORES)
    kinds = KINDS

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        if any(_repeats_prompt(row.get(name)) for name in ("chosen", "rejected")):
            return _checked(_transcripts(row, kind), row)
        parts = Parts(asked(row))
        if kind != "prompts":
            parts.responses = [answer(row, "chosen"), answer(row, "rejected")]
            if is_transcript(row["prompt"]):  # prompt and answer were one text, with a blank between them
                parts.responses = [_stripped(response) for response in parts.responses]
        return _with_scores(parts, row, kind)


def _transcripts(row: dict[str, Any], kind: str) -> Parts:
    """chosen, rejected that each hold the whole conversation: the turns that both begin with are the prompt."""
    chosen, rejected = (turns_of(row[name], name, "assistant") for name in ("chosen", "rejected"))
    for name, turns, other in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
        if turns[0]["role"] != "assistant":
            continue
        if other[0]["role"] == "assistant":
            problem = f"'{name}' is only an answer and there is no prompt; add a prompt column or a whole transcript"
            raise RowError(problem, "no prompt")
        problem = f"'{name}' is only an answer and the other a whole conversation; write both in the same way"
        raise RowError(problem, "different prompts")
    shared = _shared_turns(chosen, rejected)
    parts = Parts(around(chosen[:shared], row), [chosen[shared:], rejected[shared:]])
    return _with_scores(parts, row, kind)


class Transcripts(Format):
    """chosen, rejected that each hold the whole conversation: the turns that both begin with are the prompt."""

    name = "chosen-rejected"
    needs = ("chosen", "rejected")
    optional = (*AROUND, *SCORES)
    kinds = KINDS

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        return _transcripts(row, kind)


class ShareGPTPair(Format):
    """conversations[from, value], and chosen, rejected of one turn each."""

    name = "sharegpt-chosen-rejected"
    needs = ("conversations", "chosen", "rejected")
    answers = ("chosen", "rejected")
    optional = (*AROUND, *SCORES)
    kinds = KINDS

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        parts = Parts(around(messages_of(row["conversations"], "conversations"), row))
        if kind != "prompts":
            parts.responses = [answer(row, "chosen"), answer(row, "rejected")]
        return _with_scores(parts, row, kind)


class MessagesPair(Format):
    """messages that end in the better answer, and rejected: the worse answer, or the whole conversation with it."""

    name = "messages-rejected"
    needs = ("messages", "rejected")
    answers = ("rejected",)
    optional = (*AROUND, *SCORES)
    kinds = KINDS

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        turns = messages_of(row["messages"], "messages")
        at = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
        if kind == "prompts":
            return Parts(around(turns[:at], row))
        if at == len(turns):
            raise RowError("no assistant turn in 'messages'; add the better answer or drop the row", "no answer")
        rejected = turns_of(row["rejected"], "rejected", "assistant")
        if rejected[0]["role"] == "assistant":
            return _with_scores(Parts(around(turns[:at], row), [turns[at:], rejected]), row, kind)
        shared = _shared_turns(turns, rejected)
        return _with_scores(Parts(around(turns[:shared], row), [turns[shared:], rejected[shared:]]), row, kind)


class Scored(Format):
    """prompt, responses, scores: the highest score is best. Candidates need no scores."""

    name = "scored"
    needs = ("prompt", "responses", "scores")
    answers = ("responses", "scores")
    unranked = ("prompt", "responses")
    optional = BESIDE
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        prompt = asked(row)
        if kind == "prompts":
            return Parts(prompt)
        texts = listed(row["responses"], "responses")
        if not texts:
            raise RowError("'responses' is an empty list; write responses or drop the row", "empty response")
        responses = [turns_of(text, f"responses[{number}]", "assistant") for number, text in enumerate(texts)]
        if kind == "candidates":
            return Parts(prompt, responses)
        scores = [finite(score, f"scores[{number}]") for number, score in enumerate(listed(row["scores"], "scores"))]
        if len(scores) != len(responses):
            problem = "'responses' and 'scores' must be lists of the same length; write one score a response"
            raise RowError(problem, "scores missing")
        return Parts(prompt, responses, worth=scores, scores=scores)


class Ranked(Format):
    """completion_0 … completion_K with the rank of completion i in `ranking[i]`, or in the column `ranking_i`.

    The ranks are not an order of numbers: `[2, 3, 1]` says that completion_2 has rank 1. Candidates need no ranks.
    """

    name = "ranked"
    needs: ClassVar[tuple[str, ...]] = ("prompt", "completion_0", "completion_1", "ranking")
    answers: ClassVar[tuple[str, ...]] = ("ranking",)
    unranked = ("prompt", "completion_0")
    optional = BESIDE
    kinds = KINDS

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        prompt = asked(row)
        if kind == "prompts":
            return Parts(prompt)
        names = [name for name in (f"completion_{number}" for number in range(len(row))) if name in row]
        ranks = [] if kind == "candidates" else _ranks(row, names)
        while len(names) > max(1, len(ranks)) and row[names[-1]] in (None, ""):  # a table where other rows have more
            names.pop()
        responses = [turns_of(row[name], name, "assistant") for name in names]
        if kind == "candidates":
            return Parts(prompt, responses)
        if len(ranks) != len(responses):
            problem = f"'ranking' must be a list with one rank for each of the {len(responses)} completions"
            raise RowError(f"{problem}; add the others or drop the row", "ranks missing")
        if row.get("rank_order") not in SIGNS:
            raise RowError(NO_ORDER, "rank order not given")
        sign = SIGNS[row["rank_order"]]
        return Parts(prompt, responses, worth=[sign * finite(r, f"ranking[{n}]") for n, r in enumerate(ranks)])


class RankedColumns(Ranked):
    """Ranked completions with one column for each rank."""

    name = "ranked-columns"
    needs = ("prompt", "completion_0", "completion_1", "ranking_0", "ranking_1")
    answers = ("ranking_0", "ranking_1")


def listed(value: Any, name: str) -> list[Any]:
    """A list, or one written as JSON in the cell of a table."""
    items = value
    if isinstance(value, str):
        with suppress(ValueError):
            items = json.loads(value)
    if not isinstance(items, list):
        raise RowError(f"'{name}' is {value!r:.40}, not a list; write one in brackets, such as [2, 1, 3]", "not a list")
    return items


def _ranks(row: dict[str, Any], names: list[str]) -> list[Any]:
    """The ranks that a row gives, without empty cells at the end."""
    if row.get("ranking") not in (None, ""):
        return listed(row["ranking"], "ranking")
    ranks = [row.get(name.replace("completion", "ranking")) for name in names]
    while ranks and ranks[-1] in (None, ""):
        ranks.pop()
    return ranks


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """The number of turns that two conversations both begin with; the next turn is an answer in each."""
    pairs = zip(normalised_turns(chosen), normalised_turns(rejected), strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if shared == len(chosen) == len(rejected):  # equal: the last answer is compared with itself
        return next((i for i in range(shared - 1, 0, -1) if chosen[i]["role"] == "assistant"), shared)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) == shared:
            problem = f"'{name}' ends where the other goes on; both must end in their own answer"
            raise RowError(problem, "different prompts")
        if turns[shared]["role"] != "assistant":
            problem = f"chosen and rejected differ in turn {shared + 1}, a {turns[shared]['role']} turn"
            raise RowError(f"{problem}; they must share the prompt", "different prompts")
    return shared


def _checked(parts: Parts, row: dict[str, Any]) -> Parts:
    """The parts of transcripts, with the system turn of the prompt column. Raises `RowError` where that has other turns
    that their prompt does not have."""
    turns = turns_of(row["prompt"], "prompt", "user")
    system = [turn for turn in turns if turn["role"] == "system"]
    if system and parts.prompt[0]["role"] != "system":
        parts.prompt = [system[0], *parts.prompt]
    if not set(normalised_turns(turns)) <= set(normalised_turns(parts.prompt)):
        problem = "'prompt' is not what chosen and rejected answer; mend the row, or read all rows without this column"
        raise RowError(f"{problem}: --data.format chosen-rejected (leyden data: --format)", "different prompts")
    return parts


def _repeats_prompt(response: Any) -> bool:
    """Whether a response is a whole conversation."""
    if isinstance(response, list) and response and isinstance(response[0], dict) and "type" not in response[0]:
        return messages_of(response[:1], "chosen")[0]["role"] != "assistant"
    return is_transcript(response)


def _stripped(response: list[Message]) -> list[Message]:
    return [{**turn, "content": turn["content"].strip()} for turn in response]


def _with_scores(parts: Parts, row: dict[str, Any], kind: str) -> Parts:
    """The parts with the scores of chosen and rejected, if they are read as preferences and the row has scores."""
    if kind != "preference":
        return parts
    # looked at, but not taken: one score alone is not used, and is named
    if all(dict.get(row, name) not in (None, "") for name in ("score_chosen", "score_rejected")):
        chosen, rejected = (finite(row[name], name) for name in ("score_chosen", "score_rejected"))
        if chosen == rejected:
            problem = f"'score_chosen' and 'score_rejected' are both {chosen:g}: a tie; drop the row, or its scores"
            raise RowError(problem, "tied")
        if chosen < rejected:
            problem = (
                f"'score_chosen' {chosen:g} is below 'score_rejected' {rejected:g}; swap the answers or mend these"
            )
            raise RowError(problem, "scores contradict the pair")
        parts.scores = [chosen, rejected]
    elif row.get("margin") not in (None, ""):
        margin = finite(row["margin"], "margin")
        if margin < 0:
            raise RowError(f"'margin' is {margin:g}, below 0; swap chosen and rejected, or mend it", "negative margin")
        parts.scores = [margin, 0.0]
    return parts


def finite(value: Any, name: str) -> float:
    """A value as a finite number. Raises `RowError` where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise RowError(f"'{name}' is {value!r:.40}, not a finite number; write a number", "not a number")
    return number
