from __future__ import annotations

import copy
import json
import unicodedata
from typing import Any

import pytest

from leyden.datamodules.formats.format import KINDS
from leyden.datamodules.formats.formats import FORMATS, describe, detect, parse
from leyden.datamodules.formats.row_error import RowError
from leyden.errors import UserError
from leyden.example import Example

Q, A, B = "2+2?", "4", "5"
HH = "\n\nHuman: 2+2?\n\nAssistant: "


def turns(*pairs: str) -> list[dict[str, str]]:
    """Turns from `role: content` texts."""
    return [dict(zip(("role", "content"), pair.split(": ", 1), strict=True)) for pair in pairs]


def shared(*pairs: str) -> list[dict[str, str]]:
    words = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": words[turn["role"]], "value": turn["content"]} for turn in turns(*pairs)]


def example(row: dict[str, Any], kind: str, **options: Any) -> Example:
    """The example of a row, its format found from the row alone; reading must leave the row as it was."""
    before = copy.deepcopy(row)
    found = parse(row, detect([row], kind, options.get("columns")), kind, **options)
    assert row == before and found.row is row
    return found


NFD = unicodedata.normalize("NFD", "가")
SCORES = {"score_chosen": 3, "score_rejected": 8}
USER, ANSWER, OTHER = turns("user: 2+2?"), turns("assistant: 4"), turns("assistant: 5")

INSTRUCTION = {
    "alpaca": {"instruction": Q, "input": "", "output": A, "text": "Below is an instruction"},
    "prompt-response": {"prompt": Q, "response": A},
    "completion": {"prompt": Q, "completion": A},
    "question": {"question": Q, "answer": A},
    "Q and A": {"Q": Q, "A": A, "label": "0"},
    "Korean": {"질문": Q, "답변": A},
    "Korean decomposed": {unicodedata.normalize("NFD", "질문"): Q, unicodedata.normalize("NFD", "답변"): A},
    "Korean in and out": {"입력": Q, "출력": A},
    "Korean alpaca": {"지시": Q, "입력": "", "출력": A},
    "messages": {"messages": [*USER, *ANSWER]},
    "turns in prompt-completion": {"prompt": USER, "completion": ANSWER},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, *ANSWER]},
    "sharegpt": {"conversations": shared("user: 2+2?", "assistant: 4")},
    "capital roles": {"messages": turns("Human: 2+2?", "GPT: 4")},
}
PREFERENCE = {
    "texts": {"prompt": Q, "chosen": A, "rejected": B},
    "turns": {"prompt": USER, "chosen": ANSWER, "rejected": OTHER},
    "one turn each": {"prompt": Q, "chosen": ANSWER[0], "rejected": OTHER[0]},
    "prompt and whole conversations": {"prompt": Q, "chosen": USER + ANSWER, "rejected": USER + OTHER},
    "transcripts of turns": {"chosen": USER + ANSWER, "rejected": USER + OTHER},
    "HH": {"chosen": HH + A, "rejected": HH + B},
    "HH with prompt": {"prompt": HH, "chosen": A, "rejected": B},
    "sharegpt": {"conversations": shared("user: 2+2?"), "chosen": shared("assistant: 4")[0], "rejected": OTHER[0]},
    "HH with prompt, a blank between": {"prompt": HH, "chosen": " " + A, "rejected": " " + B},
    "prompt that starts the conversations": {"prompt": USER, "chosen": USER + ANSWER, "rejected": USER + OTHER},
    "blanks that nobody sees": {"chosen": USER + ANSWER, "rejected": turns("user: 2+2? \n", "assistant: 5")},
    "ranked": {"prompt": Q, "completion_0": B, "completion_1": A, "ranking": [2, 1]},
    "ranked in a cell": {"prompt": Q, "completion_0": B, "completion_1": A, "ranking": "[2, 1]"},
    "ranked in columns": {"prompt": Q, "completion_0": B, "completion_1": A, "ranking_0": "2", "ranking_1": "1"},
    "ranked in columns for more": {
        **{"prompt": Q, "completion_0": B, "completion_1": A, "completion_2": ""},
        **{"ranking_0": "2", "ranking_1": "1", "ranking_2": ""},
    },
    "ranked in a table for more": {
        **{"prompt": Q, "completion_0": B, "completion_1": A, "completion_2": None},
        **{"ranking": [2, 1]},
    },
    "scored": {"prompt": Q, "responses": [B, A], "scores": [1, 2.5]},
    "scored in cells": {"prompt": Q, "responses": json.dumps([B, A]), "scores": "[1, 2.5]"},
}


@pytest.mark.parametrize("name", INSTRUCTION)
def test_instruction_rows_mean_the_same(name: str) -> None:
    found = example(INSTRUCTION[name], "instruction")
    assert (found.messages, found.responses, found.text) == (USER, [ANSWER], None)


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_rows_mean_the_same(name: str) -> None:
    found = example(PREFERENCE[name], "preference", rank_order="lower_is_better")
    assert (found.messages, found.responses) == (USER, [ANSWER, OTHER])
    assert found.scores == ([2.5, 1.0] if name.startswith("scored") else None)


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_rows_are_instructions_by_their_best_answer(name: str) -> None:
    found = example(PREFERENCE[name], "instruction", rank_order="lower_is_better")
    assert (found.messages, found.responses) == (USER, [ANSWER])


@pytest.mark.parametrize("row", [*INSTRUCTION.values(), *PREFERENCE.values(), {"prompt": Q}, {"instruction": Q}])
def test_every_row_is_a_prompt_without_its_answers(row: dict[str, Any]) -> None:
    found = example(row, "prompts")
    assert (found.messages, found.responses) == (USER, [])


def test_conversations_keep_their_turns() -> None:
    talk = turns("system: Be brief.", "user: a", "assistant: b", "user: c", "assistant: d")
    found = example({"messages": talk}, "instruction")
    assert (found.messages, found.responses) == (talk[:2], [talk[2:]])
    assert example({"messages": talk}, "prompts").messages == talk[:4]
    pair = {"chosen": talk, "rejected": [*talk[:4], *turns("assistant: e")]}
    found = example(pair, "preference")
    assert (found.messages, found.responses) == (talk[:4], [talk[4:], turns("assistant: e")])
    early = {"chosen": talk, "rejected": [*talk[:2], *turns("assistant: e")]}
    assert example(early, "preference").responses == [talk[2:], turns("assistant: e")]


def test_alpaca_columns_beside_the_question() -> None:
    row = {"instruction": Q, "input": "in base 3", "output": A, "system": "Be brief.", "history": [["a", "b"]]}
    found = example(row, "instruction")
    expected = turns("system: Be brief.", "user: a", "assistant: b") + turns("user: 2+2?\n\nin base 3")
    assert (found.messages, found.responses) == (expected, [ANSWER])


def test_plain_text() -> None:
    found = example({"text": "서울", "label": 1}, "instruction")
    assert (found.messages, found.responses, found.text) == ([], [], "서울")


def test_scores_of_a_pair() -> None:
    row = PREFERENCE["texts"]
    assert example({**row, "margin": 1.5}, "preference").scores == [1.5, 0.0]
    assert example({**row, "score_chosen": 8, "score_rejected": "7"}, "preference").scores == [8.0, 7.0]


def test_ranking_is_never_guessed() -> None:
    row = {"prompt": Q, "completion_0": "x", "completion_1": "y", "completion_2": "z", "ranking": [2, 3, 1]}
    best = {
        order: [r[0]["content"] for r in example(row, "preference", rank_order=order).responses]
        for order in ("lower_is_better", "higher_is_better")
    }
    assert best == {"lower_is_better": ["z", "x", "y"], "higher_is_better": ["y", "x", "z"]}
    with pytest.raises(RowError, match="--data.rank_order lower_is_better .* --rank-order"):
        example(row, "preference")


RANKED = {"prompt": Q, "completion_0": "x", "completion_1": "y", "completion_2": "z"}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"ranking": [2, 1]}, "one rank for each of the 3 completions"),
        ({"ranking": [2, 1, 3, 4]}, "one rank for each of the 3 completions"),
        ({"ranking": "2, 1, 3"}, "'ranking' is '2, 1, 3', not a list; write one in brackets"),
        ({"ranking": [2, 1, "first"]}, "'ranking[2]' is 'first', not a finite number"),
        ({"ranking": [1, 1, 1]}, "worth the same"),
        ({"ranking_0": 1, "ranking_1": 2}, "one rank for each of the 3 completions"),
        ({"ranking": [2, 1, 3], "completion_2": ""}, "'completion_2' is empty"),
        ({"ranking": [2, 1, 3], "completion_1": "x", "completion_0": "x", "completion_2": "x"}, "responses are equal"),
    ],
)
def test_rankings_that_cannot_be_read(ranks: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        example(RANKED | ranks, "preference", rank_order="lower_is_better")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "ranks", "kept"),
    [
        ("xyz", [1, 1, 2], "xz"),  # a tie: the first of the row
        ("xyz", [2, 1, 1], "yx"),
        ("xyx", [1, 2, 1], "xy"),  # a copy with the same rank is no contradiction
        ("xyxz", [1, 1, 1, 2], "xz"),  # nor where another one ties with both
        ("xxz", [1, 2, 3], "xz"),  # copies beside each other are one response
        ("zxx", [3, 2, 1], "xz"),
    ],
)
def test_ties_and_copies_are_left_out_and_counted(texts: str, ranks: list[int], kept: str) -> None:
    row = {"prompt": Q, "ranking": ranks} | {f"completion_{i}": text for i, text in enumerate(texts)}
    found = example(row, "preference", rank_order="lower_is_better")
    assert "".join(response[0]["content"] for response in found.responses) == kept
    assert found.left_out == len(texts) - len(kept)


def test_a_row_can_carry_its_rank_order() -> None:
    row = PREFERENCE["ranked"] | {"rank_order": "higher_is_better"}
    assert example(row, "preference").responses == [OTHER, ANSWER]


def test_blanks_inside_an_answer_are_a_difference() -> None:
    """Line ends and indentation are what a preference for readable code or lists is about."""
    found = example({"prompt": Q, "chosen": "if x:\n  y", "rejected": "if x:\ny"}, "preference")
    assert len(found.responses) == 2


@pytest.mark.parametrize("row", [*INSTRUCTION.values(), *PREFERENCE.values()])
def test_every_answer_is_a_candidate_in_the_order_of_the_row(row: dict[str, Any]) -> None:
    found = example(row, "candidates")
    best_last = any(name in row for name in ("responses", "completion_0"))
    expected = [ANSWER] if row in INSTRUCTION.values() else [OTHER, ANSWER] if best_last else [ANSWER, OTHER]
    assert (found.messages, found.responses, found.scores) == (USER, expected, None)


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"prompt": Q, "responses": [A, A, "a"]}, [A, A, "a"]),  # no scores, and equal ones
        ({"prompt": Q, "responses": [A]}, [A]),
        ({"prompt": Q, "completion_0": A, "completion_1": B, "completion_2": ""}, [A, B]),
        ({"prompt": Q, "chosen": A, "rejected": A}, [A, A]),
        ({"prompt": Q, "chosen": A, "rejected": B, **SCORES}, [A, B]),
    ],
)
def test_candidates_need_not_differ_nor_be_ranked(row: dict[str, Any], texts: list[str]) -> None:
    assert [response[0]["content"] for response in example(row, "candidates").responses] == texts


def test_columns_by_mapping_come_before_names() -> None:
    row = {"질문": "no", "사용자 발화": Q, "prompt": "no", "결과": A}
    columns = {"prompt": "사용자 발화", "response": "결과"}
    assert example(row, "instruction", columns=columns).messages == USER
    rows = [row]
    assert describe(rows, "prompt-response", "instruction", columns) == (
        "prompt-response (prompt: 사용자 발화, response: 결과)"
    )


def test_exact_names_come_before_obvious_ones() -> None:
    for row in ({"Prompt": "no", "prompt": Q}, {"prompt": Q, "PROMPT": "no"}, {"question": "no", "prompt": Q}):
        assert example({**row, "answer": "no", "response": A}, "instruction").messages == USER


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"prompt": Q, "response": ""}, "instruction", "'response' is empty"),
        ({"prompt": Q, "response": None}, "instruction", "'response' is empty"),
        ({"prompt": Q, "response": " \n"}, "instruction", "'response' holds only blanks"),
        ({"prompt": Q, "response": 4}, "instruction", "'response' is 4, not a text"),
        ({"prompt": "", "response": A}, "instruction", "'prompt' is empty"),
        ({"prompt": "\ud800", "response": A}, "instruction", "half a character"),
        ({"messages": []}, "instruction", "'messages' is an empty list"),
        ({"messages": Q}, "instruction", "'messages' is not a list of turns"),
        ({"messages": [{"text": Q}]}, "instruction", "each turn needs role and content"),
        ({"messages": turns("usr: a", "assistant: b")}, "instruction", "'usr'; did you mean 'user'?"),
        ({"messages": USER}, "instruction", "no assistant turn"),
        ({"messages": ANSWER}, "instruction", "turn 1 is assistant and comes first; put a user turn before it"),
        ({"messages": USER + USER + ANSWER}, "instruction", "turn 2 is user after user; merge"),
        ({"messages": USER + ANSWER + OTHER}, "instruction", "turn 3 is assistant after assistant; merge"),
        ({"messages": USER + turns("system: x") + ANSWER}, "instruction", "a system turn can only come first"),
        ({"messages": USER + ANSWER + USER}, "instruction", "the last turn is user, not assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *ANSWER]}, "instruction", "only text"),
        (
            {"messages": [*USER, {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "instruction",
            "not the call of a",
        ),
        ({"instruction": Q, "output": A, "history": ["a"]}, "instruction", "'history' must be a list"),
        ({"prompt": Q, "chosen": A, "rejected": A}, "preference", "chosen equals rejected"),
        ({"chosen": HH + A, "rejected": HH + A}, "preference", "chosen equals rejected"),
        ({"chosen": HH + A, "rejected": HH + " "}, "preference", "'rejected, turn 2' is empty"),
        ({"chosen": A, "rejected": B}, "preference", "there is no prompt"),
        (
            {"chosen": HH + A, "rejected": "\n\nHuman: 3+3?\n\nAssistant: 5"},
            "preference",
            "differ in turn 1, a user turn",
        ),
        ({"chosen": USER + ANSWER, "rejected": USER}, "preference", "'rejected' ends where the other goes on"),
        ({"prompt": Q, "responses": [A], "scores": [1, 2]}, "preference", "lists of the same length"),
        ({"prompt": Q, "responses": [A, B], "scores": [1, 1]}, "preference", "worth the same"),
        ({"prompt": Q, "responses": [A, A, A], "scores": [1, 2, 3]}, "preference", "all responses are equal"),
        ({"prompt": Q, "responses": [A, B, A], "scores": [1, 2, 3]}, "preference", "both above and below"),
        ({"prompt": Q, "responses": A, "scores": [1]}, "preference", "'responses' is '4', not a list"),
        ({"prompt": Q, "responses": [A, ""], "scores": [1, 2]}, "preference", "'responses[1]' is empty"),
        ({"prompt": Q, "responses": [], "scores": []}, "preference", "'responses' is an empty list"),
        ({"prompt": Q, "responses": []}, "candidates", "'responses' is an empty list"),
        ({"prompt": Q, "chosen": A, "rejected": f" {A}\r\n"}, "preference", "chosen equals rejected"),
        ({"prompt": Q, "chosen": "가", "rejected": NFD}, "preference", "chosen equals rejected"),
        ({"prompt": Q, "chosen": A, "rejected": HH + B}, "preference", "'chosen' is only an answer and the other a"),
        ({"prompt": "3+3?", "chosen": HH + A, "rejected": HH + B}, "preference", "'prompt' is not what chosen and"),
        ({"prompt": Q, "chosen": A, "rejected": B, "margin": -1}, "preference", "'margin' is -1, below 0; swap"),
        ({"prompt": Q, "chosen": A, "rejected": B, "margin": "?"}, "preference", "'margin' is '?', not a finite"),
        (
            {"prompt": Q, "chosen": A, "rejected": B, **SCORES},
            "preference",
            "'score_chosen' 3 is below 'score_rejected'",
        ),
        ({"prompt": Q, "chosen": A, "rejected": B, **SCORES, "score_chosen": 8}, "preference", "are both 8: a tie"),
        ({"prompt": Q, "responses": [A, B], "scores": [1, "nan"]}, "preference", "'scores[1]' is 'nan', not a finite"),
        ({"prompt": Q, "responses": [A], "scores": [1]}, "preference", "two or more"),
        ({"messages": turns("system: x")}, "prompts", "no user turn"),
    ],
)
def test_bad_rows_say_what_is_wrong_and_what_to_do(row: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(RowError) as caught:
        example(row, kind)
    assert message in str(caught.value) and ("; " in str(caught.value)) and caught.value.reason != "bad"


def test_an_equal_pair_is_still_an_instruction() -> None:
    assert example({"prompt": Q, "chosen": A, "rejected": A}, "instruction").responses == [ANSWER]


def test_missing_columns_name_the_nearest() -> None:
    with pytest.raises(RowError, match="no column 'response'.*did you mean 'respons'"):
        parse({"prompt": Q, "respons": A}, "prompt-response", "instruction")
    with pytest.raises(UserError, match=r"columns 발화, 대꾸; name them with --prompt COLUMN --response COLUMN"):
        detect([{"발화": Q, "대꾸": A}], "instruction")
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        parse({}, "alpacca", "instruction")


def test_a_mapping_with_a_typo_never_passes() -> None:
    row = {"질문": Q, "답변": A}
    with pytest.raises(UserError, match="no column '질뭄' .prompt.; did you mean '질문'"):
        detect([row], "instruction", {"prompt": "질뭄"})
    with pytest.raises(UserError, match="nothing is called 'promt'; did you mean 'prompt'"):
        describe([row], "prompt-response", "instruction", {"promt": "질문"})
    with pytest.raises(RowError, match="no column 'Q'"):
        parse(row, "prompt-response", "instruction", {"prompt": "Q"})


def test_the_format_of_most_rows_wins() -> None:
    rows = [{"text": "x"}, {"prompt": Q, "response": A}, {"prompt": Q, "response": A}]
    assert detect(rows, "instruction") == "prompt-response"
    assert detect([{"prompt": Q, "messages": USER + ANSWER, "text": "x"}], "instruction") == "messages"


def test_every_format_has_a_name_to_force_it() -> None:
    assert set(FORMATS) == set(KINDS)
    row = {"prompt": Q, "response": A, "text": "only this"}
    assert parse(row, "text", "instruction").text == "only this"
    assert parse(row, "prompt", "prompts").messages == USER
