"""Read, refused or named: no text of a row is lost without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import prepared, write

from leyden.datamodules import InstructionData
from leyden.datamodules.commands.main import main
from leyden.datamodules.formats.formats import detect, parse
from leyden.datamodules.formats.not_read import TakenRow
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.errors import UserError
from leyden.example import Example

Row = dict[str, Any]


# -- the property ------------------------------------------------------------------------------------------------------

NAMES = (
    "prompt question instruction input output response answer answers context system history messages conversations "
    "chosen rejected responses scores score label text rank ranking completion_0 completion_1 margin id Prompt  prompt "
    "title category choices response1 response2 overall_preference kto_tag rejected_response passage 질문 답변"
).split(" ")
WORDS = st.text("abcdefgh", min_size=6, max_size=10)
SCALARS = WORDS | st.sampled_from(["", " ", None, 0, 1, 2.5, True, False, "good", "[]", "1"])
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": WORDS}, optional={"name": WORDS}
)
TALK = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=2).map(
    lambda pairs: [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)
VALUES = st.one_of(
    *(SCALARS, WORDS, TALK, st.lists(TURN, max_size=3), st.lists(SCALARS, max_size=3)),
    st.fixed_dictionaries({"text": st.lists(WORDS, max_size=2)}),
    st.lists(st.fixed_dictionaries({"response": WORDS, "score": st.integers(0, 3), "note": WORDS}), max_size=3),
    st.fixed_dictionaries({"messages": TALK, "tools": WORDS}),
)
ROWS = st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=7)


def strings(value: Any) -> list[str]:
    """Every text in a value that is no key, role, or word for a verdict."""
    if isinstance(value, dict):
        return [text for key, one in value.items() if key != "role" for text in strings(one)]
    if isinstance(value, list):
        return [text for one in value for text in strings(one)]
    return [value] if isinstance(value, str) and len(value) >= 6 else []


def said_of(example: Example) -> str:
    """All text of an example that the model sees."""
    turns = [*example.messages, *(turn for response in example.responses for turn in response)]
    return "\n".join([*(turn["content"] for turn in turns), example.text or ""])


@settings(max_examples=250, deadline=None, derandomize=True)
@given(ROWS, st.sampled_from(["instruction", "preference"]))
def test_every_text_is_seen_by_the_model_or_named_or_the_row_is_refused(row: Row, kind: str) -> None:
    try:
        example = parse(row, detect([row], kind), kind, rank_order="lower_is_better")
    except (UserError, RowError, LeftOut):
        return
    seen = said_of(example)
    for column, value in row.items():
        lost = [text for text in strings(value) if text not in seen]
        inside = [name for name in example.not_read if "." in name]  # `messages[].name`, by the name of the format
        named = column in example.not_read or (inside and not isinstance(value, str))
        assert not lost or named or example.left_out, (column, lost, example)


def test_a_column_counts_as_read_however_a_format_takes_it() -> None:
    for take in (lambda row: row["a"], lambda row: row.get("a"), dict, lambda row: {**row}, lambda row: row.items()):
        row = TakenRow({"a": 1})
        assert "a" in row and not row.taken
        take(row)
        assert row.taken == {"a"}


# -- what belongs to the prompt ----------------------------------------------------------------------------------------

PASSAGE, QUESTION, ANSWER = "The lake froze in May.", "When did it freeze?", "In May."


def prompt_of(row: Row, kind: str = "instruction", **columns: str) -> list[str]:
    found = parse(row, detect([row], kind, columns), kind, columns)
    return [f"{turn['role']}: {turn['content']}" for turn in found.messages]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"context": PASSAGE, "question": QUESTION, "answer": ANSWER}, f"{PASSAGE}\n\n{QUESTION}"),
        ({"instruction": QUESTION, "context": PASSAGE, "response": ANSWER}, f"{PASSAGE}\n\n{QUESTION}"),
        ({"instruction": "Read.", "context": PASSAGE, "question": QUESTION, "answer": ANSWER}, None),
        ({"prompt": "Read.", "input": PASSAGE, "response": ANSWER}, f"Read.\n\n{PASSAGE}"),
        ({"prompt": QUESTION, "output": ANSWER}, QUESTION),
        ({"context": [PASSAGE, "And more."], "question": QUESTION, "answer": ANSWER}, None),
        ({"prompt": f"### Passage\n{PASSAGE}\n### Q\n{QUESTION}", "context": PASSAGE, "answer": ANSWER}, None),
        (
            {"context": PASSAGE, "messages": [{"role": "user", "content": QUESTION}, {"role": "bot", "content": "a"}]},
            None,
        ),
        ({"instruction": "Is 5 + 5 = 10?", "input": "5", "output": ANSWER}, "Is 5 + 5 = 10?\n\n5"),
    ],
)
def test_columns_beside_the_question_belong_to_the_prompt(row: Row, question: str | None) -> None:
    ((turn,),) = [prompt_of(row)]
    assert question is None or turn == f"user: {question}"
    for name in ("instruction", "context", "question", "input"):
        for text in row.get(name, "") if isinstance(row.get(name), list) else [row.get(name, "")]:
            assert turn.count(text) == 1 or text == "5" or not text


@pytest.mark.parametrize("flags", [{}, {"prompt": "instruction"}])
def test_a_flag_that_names_the_prompt_drops_nothing_beside_it(flags: dict[str, str]) -> None:
    row = {"instruction": "Translate.", "input": "안녕", "chosen": "Hello.", "rejected": "Bye."}
    assert prompt_of(row, "preference", **flags) == ["user: Translate.\n\n안녕"]


def test_a_column_of_another_name_is_put_above_the_prompt_by_a_flag() -> None:
    row = {"article": PASSAGE, "question": QUESTION, "answer": ANSWER}
    assert parse(row, "prompt-response", "instruction").not_read == {"article": True}
    assert prompt_of(row, context="article") == [f"user: {PASSAGE}\n\n{QUESTION}"]


def test_two_system_texts_are_refused() -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "bot", "content": "a"},
    ]
    assert prompt_of({"messages": talk, "system": "Be brief."})[0] == "system: Be brief."
    with pytest.raises(RowError, match="'system' is not the system turn"):
        prompt_of({"messages": talk, "system": "Be long."})


def test_the_system_turn_of_a_prompt_column_is_kept_with_whole_conversations() -> None:
    user = [{"role": "user", "content": "Hi"}]
    chosen, rejected = ([*user, {"role": "assistant", "content": text}] for text in "ab")
    row = {"prompt": [{"role": "system", "content": "Be brief."}, *user], "chosen": chosen, "rejected": rejected}
    assert prompt_of(row, "preference") == ["system: Be brief.", "user: Hi"]


# -- what is said ------------------------------------------------------------------------------------------------------


def test_check_and_show_name_what_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": QUESTION, "answer": ANSWER, "article": PASSAGE, "id": n, "url": ""} for n in range(1, 4)]
    path = write(tmp_path / "a.jsonl", rows)
    for verb in ("check", "show"):
        assert main([verb, path]) == 0
        said = capsys.readouterr().out
        assert said.count("not read") == 2 and "url" not in said
        assert "warning: not read, though there is text in it: article (3 rows); " in said
        assert "--context 'article' (training: --data.columns '{context: article}')" in said
        assert "\nnot read: id (3 rows)\n" in said
        assert main([verb, path, "--context", "article"]) == 0
        said = capsys.readouterr().out
        assert "article (3" not in said and "context: article" in said


def test_training_names_what_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": QUESTION, "answer": ANSWER, "article": PASSAGE, "id": n} for n in range(1, 4)]
    pairs = [{"prompt": QUESTION, "chosen": ANSWER, "rejected": "In June."}]
    paths = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", pairs)]
    for _ in range(2):  # the second reads what the first has stored
        caplog.clear()
        with caplog.at_level("INFO", "leyden"):
            prepared(InstructionData(paths, val_fraction=0.0), tmp_path)
        assert f"{paths[0]}: warning: not read, though there is text in it: article (3 rows); " in caplog.text
        assert f"{paths[0]}: not read: id (3 rows)\n" in caplog.text
        assert "1 rows kept, dropped: none, 1 responses not trained" in caplog.text
        assert f"{paths[1]}: not read" not in caplog.text


def test_a_column_whose_text_is_trained_anyway_is_no_warning() -> None:
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    row = {"messages": talk, "prompt": QUESTION, "title": "Of lakes and ice"}
    assert parse(row, "messages", "instruction").not_read == {"prompt": False, "title": True}


def test_a_label_that_is_not_taken_as_a_verdict_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [{"Q": QUESTION, "A": ANSWER, "label": 0}])
    assert main(["check", path]) == 0
    said = capsys.readouterr().out
    assert "not read: label (1 row)\nwarning: if 'label' says which answers are good: --format unpaired" in said
    assert main(["check", path, "--format", "unpaired", "--kind", "instruction"]) == 2
