"""Rows as well-known data sets and tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leyden.datamodules.commands.main import main
from leyden.datamodules.formats.formats import detect, parse
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.source import Source
from leyden.errors import UserError
from leyden.example import Example

Row = dict[str, Any]
Q, A, B = "2+2?", "4", "5"
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", Q), ("assistant", A), ("assistant", B)))

PAIRS: dict[str, tuple[Row, str]] = {
    "OpenAI": (
        {"input": {"messages": [USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        "prompt-chosen-rejected",
    ),
    "ms-swift": ({"query": Q, "response": A, "rejected_response": B}, "prompt-chosen-rejected"),
    "ms-swift messages": ({"messages": [USER, GOOD], "rejected_response": B}, "messages-rejected"),
    "ms-swift both": ({"messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, "messages-rejected"),
    "Argilla": (
        {"prompt": Q, "chosen": [USER, GOOD], "rejected": [USER, BAD], "chosen-rating": 4, "rejected-rating": 2},
        "prompt-chosen-rejected",
    ),
    "instruction": ({"instruction": Q, "chosen_response": A, "rejected_response": B}, "prompt-chosen-rejected"),
    "UltraFeedback": (
        {"instruction": Q, "completions": [{"response": B, "overall_score": 2}, {"response": A, "overall_score": 7.5}]},
        "scored-objects",
    ),
    "generations": ({"input": Q, "generations": [B, A], "ratings": [1, 5]}, "scored"),
    "Nectar": (
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
            "answers": [{"answer": B, "rank": 2.0}, {"answer": A, "rank": 1.0}],
        },
        "scored-objects",
    ),
    "HelpSteer3": (
        {"context": [USER], "response1": B, "response2": A, "overall_preference": 2, "domain": "general"},
        "helpsteer3",
    ),
    "HelpSteer2": ({"prompt": Q, "response_1": A, "response_2": B, "preference_strength": -1}, "helpsteer2-preference"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    row, format = PAIRS[name]
    assert detect([row], "preference") == format
    found = parse(row, format, "preference", rank_order="lower_is_better")
    assert (found.messages, found.responses) == ([USER], [[GOOD], [BAD]])
    assert parse(row, format, "instruction", rank_order="lower_is_better").responses == [[GOOD]]
    assert parse(row, format, "prompts").messages == [USER]


def read(tmp_path: Path, rows: list[Row], kind: str | None, **options: Any) -> list[Example | Exception]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [example for _, example in Source(str(path), kind, **options).examples(lambda note: None)[1]]


# -- rows with a label -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad"), [(True, False), ("good", "bad"), (1, 0), (1, -1), ("True", "False"), ("1", "0"), ("+1", "-1")]
)
@pytest.mark.parametrize("asks", [{"prompt": Q}, {"instruction": Q}, {"messages": [USER]}, {"conversations": [USER]}])
def test_only_answers_labelled_as_good_are_instructions(tmp_path: Path, asks: Row, good: Any, bad: Any) -> None:
    def row(answer: Row, label: Any) -> Row:
        talk = {name: [*turns, answer] for name, turns in asks.items() if isinstance(turns, list)}
        return talk | {"label": label} if talk else {**asks, "completion": answer["content"], "label": label}

    rows = [row(GOOD, good), row(BAD, bad)]
    first, second = read(tmp_path, rows, "instruction")
    assert isinstance(first, Example) and first.responses == [[GOOD]]
    assert isinstance(second, LeftOut) and str(second) == "labelled as bad answers"
    with pytest.raises(UserError, match="the rows hold single answers .* --kind instruction"):
        detect(rows[:1] if "prompt" not in asks else rows, "preference")


def test_left_out_answers_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(
        tmp_path, [{"prompt": Q, "completion": A, "label": True}, {"prompt": Q, "completion": B, "label": False}], None
    )
    assert main(["check", str(tmp_path / "rows.jsonl")]) == 0
    assert "usable 1 · bad 0 · left out 1 (1 labelled as bad answers)" in capsys.readouterr().out


@pytest.mark.parametrize("labels", [[0, 0], [0, 2], ["joy", "anger"]])
def test_a_label_that_names_a_class_is_named_and_not_a_verdict(labels: list[Any]) -> None:
    rows = [{"prompt": Q, "response": A, "label": label} for label in labels]
    assert detect(rows, "instruction") == "prompt-response"
    assert "label" in parse(rows[0], "prompt-response", "instruction").not_read


@pytest.mark.parametrize(
    "asks", [{"prompt": Q, "completion": B}, {"instruction": Q, "output": B}, {"messages": [USER, BAD]}]
)
@pytest.mark.parametrize("lacks", [0, 2])
def test_a_row_without_the_label_that_most_rows_have_is_refused(tmp_path: Path, asks: Row, lacks: int) -> None:
    rows = [{**asks, "label": False}, {**asks, "label": True}]
    rows.insert(lacks, asks)
    found = read(tmp_path, rows, "instruction")
    assert isinstance(found[lacks], RowError) and "no column 'label'" in str(found.pop(lacks))
    assert isinstance(found[0], LeftOut) and isinstance(found[1], Example)
    few = read(tmp_path, [asks, asks, {**asks, "label": True}], "instruction")
    assert all(isinstance(one, Example) for one in few)


@pytest.mark.parametrize("name", ["kto_label", "is_good", "is_desirable", "liked", "Liked", "labels"])
def test_other_names_of_the_label(tmp_path: Path, name: str) -> None:
    good, bad = read(
        tmp_path, [{"prompt": Q, "response": A, name: True}, {"prompt": Q, "response": B, name: False}], "instruction"
    )
    assert isinstance(good, Example) and good.responses == [[GOOD]] and isinstance(bad, LeftOut)


def test_a_label_that_is_no_verdict_is_refused() -> None:
    with pytest.raises(RowError, match="neither good .* nor bad"):
        parse({"prompt": Q, "response": A, "label": 3}, "unpaired", "instruction")


# -- questions with several answers, and one row an answer -------------------------------------------------------------


def test_squad(tmp_path: Path) -> None:
    row = {
        "id": "1",
        "title": "T",
        "context": "Sum.",
        "question": Q,
        "answers": {"text": [A, A], "answer_start": [0, 0]},
    }
    found, none = read(tmp_path, [row, {**row, "answers": {"text": [], "answer_start": []}}], "instruction")
    assert isinstance(found, Example) and found.messages[0]["content"] == f"Sum.\n\n{Q}"
    assert found.responses == [[GOOD]] and set(found.not_read) == {"id", "title", "answers.answer_start"}
    assert isinstance(none, LeftOut)


def test_scores_of_one_row_an_answer_are_compared_by_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": Q, "response": B, "helpfulness": 1, "verbosity": 2},
        {"prompt": Q, "response": A, "helpfulness": 3, "verbosity": 2},
        {"prompt": "alone", "response": A, "helpfulness": 3, "verbosity": 2},
    ]
    found, alone = read(tmp_path, rows, "preference")
    assert isinstance(found, Example) and found.responses == [[GOOD], [BAD]] and found.scores == [3.0, 1.0]
    assert set(found.not_read) == {"verbosity"} and isinstance(alone, LeftOut)
    with pytest.raises(UserError, match="the rows hold single answers"):
        detect(rows[1:], "preference")
    assert len(read(tmp_path, rows, "instruction")) == 3


# -- trees of messages, one a row --------------------------------------------------------------------------------------

TREE = [  # an answer may stand before its question
    {"message_id": "c", "parent_id": "a", "role": "assistant", "text": B, "rank": 1.0, "lang": "en"},
    {"message_id": "a", "parent_id": None, "role": "prompter", "text": Q, "rank": None, "lang": "en"},
    {"message_id": "b", "parent_id": "a", "role": "assistant", "text": A, "rank": 0.0, "lang": "en"},
    {"message_id": "d", "parent_id": "b", "role": "prompter", "text": "Sure?", "rank": 0.0, "lang": "en"},
    {"message_id": "e", "parent_id": "d", "role": "assistant", "text": "Yes.", "rank": None, "lang": "en"},
    {"message_id": "f", "parent_id": "e", "role": "prompter", "text": "Bye.", "rank": None, "lang": "en"},
]


def test_messages_of_a_tree_are_read_as_its_conversations(tmp_path: Path) -> None:
    first, second, third = read(tmp_path, TREE, "instruction")
    assert isinstance(first, Example) and (first.messages, first.responses) == ([USER], [[GOOD]])
    assert first.left_out == 1 and set(first.not_read) == {"lang"}
    assert isinstance(second, Example) and [turn["content"] for turn in second.messages] == [Q, A, "Sure?"]
    assert second.responses[0][0]["content"] == "Yes." and isinstance(third, LeftOut)
    ranked, single, none = read(tmp_path, TREE, "preference")
    assert isinstance(ranked, Example) and ranked.responses == [[GOOD], [BAD]]
    assert isinstance(single, LeftOut) and isinstance(none, LeftOut)
    assert [len(one.messages) for one in read(tmp_path, TREE, "prompts") if isinstance(one, Example)] == [1, 3, 5]


@pytest.mark.parametrize("change", [{"message_id": "a"}, {"parent_id": "b"}, {"parent_id": None}, {"rank": "first"}])
def test_a_message_that_would_be_lost_from_its_tree_is_refused(tmp_path: Path, change: Row) -> None:
    rows = [*TREE[:3], {"message_id": "x", "parent_id": "a", "role": "assistant", "text": "6", "rank": 2} | change]
    assert any(isinstance(one, RowError) for one in read(tmp_path, rows, "instruction"))


def test_messages_without_their_tree_are_refused(tmp_path: Path) -> None:
    lost, circle = {**TREE[3], "parent_id": "gone"}, {**TREE[3], "message_id": "g", "parent_id": "g"}
    *_, gone, round_ = read(tmp_path, [*TREE[:3], lost, circle], "instruction")
    assert isinstance(gone, RowError) and "'gone', which is not in the file" in str(gone)
    assert isinstance(round_, RowError) and "in a circle" in str(round_)


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"fields": {"prompt": Q}, "responses": []}, "records of Argilla"),
        (
            {"conversation_a": [USER], "conversation_b": [USER], "winner": "model_a"},
            "the better conversation as chosen",
        ),
        ({"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 0}, "that better_response_id names"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "give their text"),
    ],
)
def test_shapes_that_are_not_read_are_told_what_to_do(row: Row, advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        detect([row], "preference")


def test_converted_rows_keep_their_labels_and_trees(tmp_path: Path) -> None:
    for name, rows in (("tree", TREE), ("label", [{"prompt": Q, "completion": B, "label": False}])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        assert main(["convert", str(tmp_path / f"{name}.json")]) == 0
        assert len((tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()) == len(rows)
