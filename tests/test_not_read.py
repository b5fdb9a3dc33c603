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
from leyden.datamodules.formats.formats import describe, detect, parse
from leyden.datamodules.formats.not_read import TakenRow, count, lines
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


def lines_of(rows: list[Row], kind: str = "instruction", **columns: str) -> list[str]:
    """What is said of a file of these rows."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        count(parse(row, detect(rows, kind, columns), kind, columns).not_read, counts)
    return lines(counts, kind)


TALK_ROW = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": QUESTION, "response": ANSWER}, "unpaired "),
        ({"instruction": QUESTION, "output": ANSWER}, "unpaired "),
        (TALK_ROW, "unpaired-messages "),
        ({"conversations": TALK_ROW["messages"]}, "unpaired-sharegpt "),
        ({"text": ANSWER}, ""),
    ],
)
def test_the_format_that_is_advised_for_a_label_reads_the_row(row: Row, format: str) -> None:
    (named, *rest) = lines_of([{**row, "label": 0}])
    assert named == "not read: label (1 row)"
    said = f"warning: if 'label' says which answers are good: --format {format}(training: --data.format)"
    assert rest == ([said] if format else [])
    if format:
        assert "label" not in parse({**row, "label": 1}, format.strip(), "instruction").not_read
    assert lines_of([{**row, "label": 0}], "prompts" if format else "instruction")[0].endswith(
        "label (1 row) (rewards see the whole row)" if format else "label (1 row)"
    )


def test_a_label_beside_a_pair_is_no_advice() -> None:
    pair = {"prompt": QUESTION, "chosen": ANSWER, "rejected": "June.", "label": 1}
    assert lines_of([pair], "preference") == ["not read: label (1 row)"]


# -- several columns for one thing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "prompt", "response"),
    [
        ("q a question answer", "question", "answer"),
        ("question reply answer", "question", "answer"),
        ("질문 정답 답변", "질문", "답변"),
        ("question a output", "question", "output"),
        ("q a", "q", "a"),
        ("Q A 답변", "Q", "답변"),
        ("question a b c d answer", "question", "answer"),
        ("question A B C Correct output", "question", "output"),
    ],
)
def test_the_plainest_of_several_names_is_taken_wherever_it_stands(columns: str, prompt: str, response: str) -> None:
    for names in (columns.split(), columns.split()[::-1]):
        row = {name: f"the {name}" for name in names}
        found = parse(row, detect([row], "instruction"), "instruction")
        assert said_of(found).strip() == f"the {prompt}\nthe {response}"
        assert {name for name in found.not_read if name in row} == {*row} - {prompt, response}


def test_choices_are_named_and_none_of_them_is_trained() -> None:
    row = {"Question": QUESTION, **dict(zip("ABCD", ("May", "June", "July", "Fall"), strict=True))}
    assert lines_of([row | {"Answer": "B"}]) == [
        "warning: not read, though there is text in it: A (1 row), B (1 row), C (1 row), D (1 row); "
        "if these are the choices of a question, write them into its text"
    ]
    with pytest.raises(UserError, match="no instruction format fits the columns Question, A, B, C, D"):
        detect([row], "instruction")


@pytest.mark.parametrize(
    "asks", [{"prompt": QUESTION, "response": ANSWER}, {"instruction": QUESTION, "output": ANSWER}]
)
def test_a_second_answer_is_never_advised_as_part_of_the_prompt(asks: Row) -> None:
    row = {**asks, "answer": "June"}
    assert lines_of([row]) == [
        "warning: not read, though there is text in it: answer (1 row); if it is to be read instead: "
        "--response 'answer' (training: --data.columns '{response: answer}')"
    ]
    assert parse(row, detect([row], "instruction"), "instruction", {"response": "answer"}).responses == [
        [{"role": "assistant", "content": "June"}]
    ]
    (line,) = lines_of([{**TALK_ROW, "answer": "In the month of May.", "article": PASSAGE}])
    assert "article (1 row), answer (1 row); if it belongs to the prompt: --context 'article'" in line
    (line,) = lines_of([{**TALK_ROW, "answer": "In the month of May."}])
    assert line.endswith("answer (1 row); is this meant to be left out?")


# -- what may be a loss flag -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["mask", "masked", "ignore", "skip", "Mask", "train_detail"])
def test_a_key_that_may_be_a_loss_flag_is_a_warning(key: str) -> None:
    user, answer = TALK_ROW["messages"]
    said = lines_of([{"messages": [user, {**answer, key: [1]}]}])
    assert f"not read: messages[].{key} (1 row)" in said[0]
    assert said[1].startswith(f"warning: messages[].{key}: this may be a loss flag, and it is not read; flags are read")
    assert "weight, loss_weight, train, " in said[1]


@pytest.mark.parametrize("column", [{"train": False}, {"weight": 0}, {"loss_mask": [0, 1]}, {"weights": [0, 0, 0, 1]}])
def test_a_column_that_may_be_a_loss_flag_is_a_warning(column: Row) -> None:
    (name,) = column
    for row in (TALK_ROW, {"prompt": QUESTION, "response": ANSWER}):
        assert lines_of([row | column])[1].startswith(f"warning: {name}: this may be a loss flag, and it is not read; ")


# -- one score of a pair -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["score_chosen", "score_rejected"])
def test_one_score_alone_is_not_read(name: str) -> None:
    row = {"prompt": QUESTION, "chosen": ANSWER, "rejected": "June.", name: 3}
    assert lines_of([row], "preference") == [f"not read: {name} (1 row)"]
    assert name not in describe([row], "prompt-chosen-rejected", "preference")
    both = {"score_chosen": 3, "score_rejected": 1}
    assert lines_of([row | both], "preference") == []
    assert "score_chosen, score_rejected" in describe([row | both], "prompt-chosen-rejected", "preference")
