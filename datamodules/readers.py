"""How each format is read: a row under canonical column names -> the turns before the answers, and the answers.

Every reader takes the row and whether answers are wanted (prompts alone are read from rows without them), is pure,
and raises `RowError`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from leyden.datamodules.turns import RowError, is_transcript, messages_of, text_of, turns_of, with_roles_split
from leyden.example import Message


@dataclass
class Parts:
    """What a format finds in a row: the turns before the answers, and the answers, best first."""

    prompt: list[Message]
    responses: list[list[Message]] = field(default_factory=list)
    scores: list[float] | None = None
    text: str | None = None
    """Plain text for continued pretraining; then there are no turns."""


def messages(row: dict[str, Any], answers: bool) -> Parts:
    """messages[role, content]."""
    return _conversation(messages_of(row["messages"], "messages"), row, answers)


def sharegpt(row: dict[str, Any], answers: bool) -> Parts:
    """conversations[from, value]."""
    return _conversation(messages_of(row["conversations"], "conversations"), row, answers)


def _conversation(turns: list[Message], row: dict[str, Any], answers: bool) -> Parts:
    turns = _with_system(turns, row)
    if not answers:
        return Parts(turns)
    prompt, response = with_roles_split(turns)
    if not response:
        raise RowError("no assistant turn: nothing to train; add the answer or drop the row")
    return Parts(prompt, [response])


def alpaca(row: dict[str, Any], answers: bool) -> Parts:
    """instruction, input, output, with history (not trained) and system where they are there."""
    text = text_of(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        text = f"{text}\n\n{text_of(row['input'], 'input')}"
    turns = [*_history(row.get("history")), Message(role="user", content=text)]
    return Parts(_with_system(turns, row), [_answer(row, "output")] if answers else [])


def prompt_response(row: dict[str, Any], answers: bool) -> Parts:
    """prompt, response: texts or turns."""
    prompt = _with_system([*_history(row.get("history")), *turns_of(row["prompt"], "prompt", "user")], row)
    return Parts(prompt, [_answer(row, "response")] if answers else [])


def input_output(row: dict[str, Any], answers: bool) -> Parts:
    """input, output without an instruction."""
    prompt = _with_system(turns_of(row["input"], "input", "user"), row)
    return Parts(prompt, [_answer(row, "output")] if answers else [])


def text(row: dict[str, Any], answers: bool) -> Parts:
    """Plain text."""
    return Parts([], text=text_of(row["text"], "text"))


def pair(row: dict[str, Any], answers: bool) -> Parts:
    """prompt, chosen, rejected: texts or turns; answers that repeat the conversation are read as transcripts."""
    if _repeats_prompt(row["chosen"]):
        return transcripts(row, answers)
    prompt = _with_system(turns_of(row["prompt"], "prompt", "user"), row)
    return Parts(prompt, [_answer(row, "chosen"), _answer(row, "rejected")] if answers else [], _pair_scores(row))


def transcripts(row: dict[str, Any], answers: bool) -> Parts:
    """chosen, rejected that each hold the whole conversation: what they share is the prompt."""
    chosen, rejected = (turns_of(row[name], name, "assistant") for name in ("chosen", "rejected"))
    if chosen[0]["role"] == "assistant":
        raise RowError("'chosen' is only an answer and there is no prompt; add a prompt column or a whole transcript")
    if chosen == rejected:
        shared = next((i for i in range(len(chosen) - 1, 0, -1) if chosen[i]["role"] == "assistant"), len(chosen))
    else:
        pairs = zip(chosen, rejected, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if shared < max(len(chosen), len(rejected)):
        for name, turns in (("chosen", chosen), ("rejected", rejected)):
            if len(turns) == shared:
                raise RowError(f"'{name}' ends where the other goes on; both must end in their own answer")
            if turns[shared]["role"] != "assistant":
                raise RowError(
                    f"chosen and rejected differ in turn {shared + 1}, a user turn; they must share the prompt"
                )
    return Parts(_with_system(chosen[:shared], row), [chosen[shared:], rejected[shared:]], _pair_scores(row))


def sharegpt_pair(row: dict[str, Any], answers: bool) -> Parts:
    """conversations[from, value], and chosen, rejected of one turn each."""
    prompt = _with_system(messages_of(row["conversations"], "conversations"), row)
    return Parts(prompt, [_answer(row, "chosen"), _answer(row, "rejected")] if answers else [], _pair_scores(row))


def scored(row: dict[str, Any], answers: bool) -> Parts:
    """prompt, responses, scores: the highest score is best."""
    prompt = _with_system(turns_of(row["prompt"], "prompt", "user"), row)
    if not answers:
        return Parts(prompt)
    responses, scores = row["responses"], row["scores"]
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise RowError("'responses' and 'scores' must be lists of the same length; write one score a response")
    numbers = [_number(score, f"scores[{index}]") for index, score in enumerate(scores)]
    return _best_first(prompt, responses, numbers, "responses", keep_scores=True)


def ranked(row: dict[str, Any], answers: bool) -> Parts:
    """completion_0 … completion_K with `ranking[i]`, the rank of completion i."""
    prompt = _with_system(turns_of(row["prompt"], "prompt", "user"), row)
    if not answers:
        return Parts(prompt)
    completions = [row[f"completion_{i}"] for i in range(len(row)) if f"completion_{i}" in row]
    ranking = row["ranking"]
    if not isinstance(ranking, list) or len(ranking) != len(completions):
        raise RowError(f"'ranking' must be a list with one rank for each of the {len(completions)} completions")
    signs = {"lower_is_better": -1.0, "higher_is_better": 1.0}
    if row.get("rank_order") not in signs:
        raise RowError(
            "a ranking can be read both ways; say rank_order: lower_is_better (1 is best) | higher_is_better"
        )
    ranks = [_number(rank, f"ranking[{index}]") * signs[row["rank_order"]] for index, rank in enumerate(ranking)]
    return _best_first(prompt, completions, ranks, "completion", keep_scores=False)


def prompt_only(row: dict[str, Any], answers: bool) -> Parts:
    """prompt: a text or turns."""
    return Parts(_with_system(turns_of(row["prompt"], "prompt", "user"), row))


def _answer(row: dict[str, Any], name: str) -> list[Message]:
    return turns_of(row[name], name, "assistant")


def _with_system(turns: list[Message], row: dict[str, Any]) -> list[Message]:
    system = row.get("system")
    if system in (None, "") or (turns and turns[0]["role"] == "system"):
        return turns
    return [Message(role="system", content=text_of(system, "system")), *turns]


def _history(history: Any) -> list[Message]:
    """Earlier turns of an Alpaca row: a list of [question, answer] pairs."""
    turns: list[Message] = []
    for number, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("'history' must be a list of [question, answer] pairs; mend it or drop the column")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role=role, content=text_of(text, f"history[{number}]")))
    return turns


def _repeats_prompt(answer: Any) -> bool:
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        return messages_of(answer[:1], "chosen")[0]["role"] != "assistant"
    return is_transcript(answer)


def _pair_scores(row: dict[str, Any]) -> list[float] | None:
    if row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        return [_number(row[name], name) for name in ("score_chosen", "score_rejected")]
    return [_number(row["margin"], "margin"), 0.0] if row.get("margin") is not None else None


def _best_first(prompt: list[Message], answers: list[Any], worth: list[float], name: str, keep_scores: bool) -> Parts:
    if len(answers) < 2:
        raise RowError(f"only {len(answers)} answer; a preference needs two or more")
    if len(set(worth)) == 1:
        raise RowError("all answers are worth the same: the row says nothing about preference; drop it")
    order = sorted(range(len(answers)), key=lambda index: -worth[index])
    responses = [turns_of(answers[index], f"{name}[{index}]", "assistant") for index in order]
    return Parts(prompt, responses, [worth[index] for index in order] if keep_scores else None)


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise RowError(f"'{name}' is {value!r:.40}, not a finite number; write a number")
    return number
