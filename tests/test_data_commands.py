from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat import CHATML, THINKING, byte_level
from rich.console import Console

from leyden.datamodules import PreferenceData
from leyden.datamodules.commands import main as commands
from leyden.datamodules.commands.main import main
from leyden.datamodules.commands.show import show
from leyden.datamodules.files.files import read_rows
from leyden.datamodules.formats.row_error import RowError
from leyden.datamodules.formats.turns import turns_of
from leyden.datamodules.source import Source
from leyden.datamodules.storage.arrow import Store
from leyden.errors import UserError
from leyden.example import Example

TABLE = "질문,답변,번호\n안녕?,네.,1\n뭐 해?,쉬어요.,2\n"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def listing(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "대화.csv"
    path.write_bytes(TABLE.encode("cp949"))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save_pretrained(folder)
    return str(folder)


# convert


def test_a_korean_table_becomes_jsonl(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(table)]) == 0
    assert rows(table.with_suffix(".jsonl")) == [
        {"prompt": "안녕?", "response": "네.", "번호": "1"},
        {"prompt": "뭐 해?", "response": "쉬어요.", "번호": "2"},
    ]
    said = capsys.readouterr().out
    assert (
        "CP949, comma" in said and "2 rows, instruction data as prompt-response (prompt: 질문, response: 답변)" in said
    )
    assert "kept 번호" in said


def test_columns_are_named_by_flags(tmp_path: Path) -> None:
    source = tmp_path / "a.tsv"
    source.write_text("발화\t좋음\t나쁨\n안녕?\t네.\t왜?\n", encoding="utf-8")
    flags = ["--prompt", "발화", "--chosen", "좋음", "--rejected", "나쁨"]
    assert main(["convert", str(source), str(tmp_path / "out" / "b.jsonl"), *flags]) == 0
    assert rows(tmp_path / "out" / "b.jsonl") == [{"prompt": "안녕?", "chosen": "네.", "rejected": "왜?"}]
    assert main(["convert", str(source), str(tmp_path / "c.jsonl"), "--prompt=발화", "--response=좋음"]) == 0
    assert rows(tmp_path / "c.jsonl") == [{"prompt": "안녕?", "response": "네.", "나쁨": "왜?"}]
    assert main(["convert", str(source), str(tmp_path / "d.jsonl"), "--prompt=발화"]) == 0
    assert rows(tmp_path / "d.jsonl")[0]["prompt"] == "안녕?"
    with pytest.raises(UserError, match="no column '바화' .*did you mean '발화'"):
        main(["convert", str(source), "--prompt", "바화", "--response", "좋음"])


def test_a_folder_is_converted_beside_its_originals(tmp_path: Path, table: Path) -> None:
    (tmp_path / "b.json").write_text('[{"instruction": "a", "input": "", "output": "b", "id": 1}]', encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("{}", encoding="utf-8")
    assert main(["convert", str(tmp_path)]) == 0
    assert listing(tmp_path) == {"대화.csv", "대화.jsonl", "b.json", "b.jsonl", "c.jsonl"}
    assert rows(tmp_path / "b.jsonl") == [{"instruction": "a", "output": "b", "input": "", "id": 1}]
    (tmp_path / "b.csv").write_text("prompt,response\na,b\n", encoding="utf-8")
    with pytest.raises(UserError, match="would be written twice"):
        main(["convert", str(tmp_path), "--overwrite"])


def test_a_converted_folder_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response\n1,2\n3,\n", encoding="utf-8")
    (tmp_path / "b.json").write_text('[{"prompt": "5", "response": "6"}]', encoding="utf-8")
    assert main(["convert", str(tmp_path)]) == 1
    assert listing(tmp_path) == {"a.csv", "a.jsonl", "a.rejected.jsonl", "b.json", "b.jsonl"}
    notes: list[str] = []
    found = [row["prompt"] for _, row in read_rows(tmp_path, on_note=notes.append)]
    assert found == ["1", "5"]
    assert notes == [
        f"{tmp_path}: not read: a.rejected.jsonl",
        f"{tmp_path}: not read, because there is a .jsonl of the same name: a.csv, b.json",
    ]


def test_a_bad_file_does_not_keep_a_folder_from_being_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.csv").write_text("prompt,response\n1,2\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("x,y\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"not converted: \S+b.csv \(see above\); written: \S+a.jsonl, \S+c.jsonl;"):
        main(["convert", str(tmp_path)])
    assert f"error: {tmp_path / 'b.csv'}: " in capsys.readouterr().out
    (tmp_path / "b.csv").write_text("prompt,response\n3,4\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("precious", encoding="utf-8")
    assert main(["convert", str(tmp_path)]) == 0
    assert rows(tmp_path / "b.jsonl") == [{"prompt": "3", "response": "4"}]
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == "precious"
    assert "a.csv: skipped" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(table: Path) -> None:
    out = table.with_suffix(".jsonl")
    out.write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="exists already; add --overwrite"):
        main(["convert", str(table)])
    assert out.read_text(encoding="utf-8") == "precious"
    assert main(["convert", str(table), "--overwrite"]) == 0 and len(rows(out)) == 2


def test_bad_rows_are_kept_apart_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.csv"
    source.write_text("prompt,response\na,b\nc,\nd,e,f\ng,h\n", encoding="utf-8")
    assert main(["convert", str(source)]) == 1
    assert [row["prompt"] for row in rows(tmp_path / "a.jsonl")] == ["a", "g"]
    rejected = rows(tmp_path / "a.rejected.jsonl")
    assert sorted(row["place"].rpartition(":")[2] for row in rejected) == ["3", "4"]
    assert {"prompt": "c", "response": ""} in [row.get("row") for row in rejected]
    assert "2 rows rejected" in capsys.readouterr().out
    source.write_text("prompt,response\na,b\n", encoding="utf-8")
    assert main(["convert", str(source), "--overwrite"]) == 0
    assert listing(tmp_path) == {"a.csv", "a.jsonl"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("prompt,response\n,\na,\n", "none of its"),
        ("prompt,response\n", "no rows in it"),
        ("x,y\n1,2\n", "no preference format|no instruction format"),
        ("말,prompt,response\na,b,c\n", "cannot become 'prompt'"),
    ],
)
def test_errors_leave_nothing_behind(tmp_path: Path, data: str, message: str) -> None:
    source = tmp_path / "a.csv"
    source.write_text(data, encoding="utf-8")
    flags = ["--prompt", "말", "--response", "response"] if data.startswith("말") else []
    with pytest.raises(UserError, match=message):
        main(["convert", str(source), *flags])
    assert listing(tmp_path) == {"a.csv"}


def test_a_late_error_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_text('[{"prompt": "a", "response": "b"},\n' * 1 + '{"prompt": "a"', encoding="utf-8")
    with pytest.raises(UserError, match=r"a.json:2: broken JSON"):
        main(["convert", str(source)])
    long = "[" + '{"prompt": "a", "response": "b"},\n' * 500 + "oops]"
    source.write_text(long, encoding="utf-8")
    with pytest.raises(UserError, match=r"a.json:501: broken JSON"):
        main(["convert", str(source)])
    assert listing(tmp_path) == {"a.json"}


def test_hangul_is_composed_and_nothing_else_changes(tmp_path: Path) -> None:
    compatibility = "\u212b \u2460 \ufb01 \u3147 \uf900"  # letters that normalising the whole text would replace
    text = unicodedata.normalize("NFD", "질문입니다") + compatibility
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({unicodedata.normalize("NFD", "질문"): text, "답변": "네"}), encoding="utf-8")
    assert main(["convert", str(source), str(tmp_path / "b.jsonl")]) == 0
    assert rows(tmp_path / "b.jsonl") == [{"prompt": "질문입니다" + compatibility, "response": "네"}]


def test_what_json_cannot_hold_is_rejected(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_text(
        '[{"prompt": "a", "response": "b", "score": NaN}, {"prompt": "a", "response": "b"}]', encoding="utf-8"
    )
    assert main(["convert", str(source)]) == 1
    assert len(rows(tmp_path / "a.jsonl")) == 1
    assert "cannot be written as JSON" in rows(tmp_path / "a.rejected.jsonl")[0]["problem"]


def test_no_column_is_overwritten_by_another(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    lines = [{"question": "Q1", "answer": "A1"}, {"prompt": "", "question": "Q2", "answer": "A2"}]
    lines += [{"prompt": "P3", "question": "Q3", "answer": "A3"}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(["convert", str(source), str(tmp_path / "b.jsonl")]) == 1
    assert [row["prompt"] for row in rows(tmp_path / "b.jsonl")] == ["Q1", "Q2"]
    (rejected,) = rows(tmp_path / "b.rejected.jsonl")
    assert "'question' would become 'prompt', which the row has too" in rejected["problem"]


RANKED = "질문,completion_0,completion_1,completion_2,{}\n"


@pytest.mark.parametrize(
    ("header", "lines", "expected"),
    [
        ("ranking", '안녕?,가,나,다,"[2, 3, 1]"\n뭐 해?,가,나,,"[2, 1]"\n', [[2, 3, 1], [2, 1]]),
        ("ranking_0,ranking_1,ranking_2", "안녕?,가,나,다,2,3,1\n뭐 해?,가,나,,2,1,\n", None),
    ],
)
def test_a_ranked_table_becomes_preferences(
    tmp_path: Path, header: str, lines: str, expected: list[list[int]] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.csv", tmp_path / "a.jsonl"
    source.write_text(RANKED.format(header) + lines, encoding="utf-8")
    assert main(["convert", str(source), "--prompt", "질문"]) == 0
    assert "preference data as ranked" in capsys.readouterr().out
    if expected is not None:
        assert [row["ranking"] for row in rows(out)] == expected
    for path in (source, out):
        _, found = Source(
            str(path), columns={} if path == out else {"prompt": "질문"}, rank_order="lower_is_better"
        ).examples(print)
        best = [["".join(r[0]["content"] for r in e.responses)] for _, e in found if not isinstance(e, RowError)]
        assert best == [["다가나"], ["나가"]]


def test_scores_in_cells_become_lists(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text('prompt,responses,scores\na,"[""b"", ""c""]","[1, 2]"\nd,e,"[1]"\n', encoding="utf-8")
    assert main(["convert", str(source)]) == 1
    assert rows(tmp_path / "a.jsonl") == [{"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}]
    assert "'responses' is 'e', not a list" in rows(tmp_path / "a.rejected.jsonl")[0]["problem"]


# check


def test_check_counts_and_names_every_bad_row(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    decomposed = unicodedata.normalize("NFD", "가")
    lines = ['{"prompt": "Hello", "response": "네"}'] * 2
    lines += ['{"prompt": "a", "response": ""}', "{oops", f'{{"prompt": "{decomposed}", "response": "<s>"}}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    argv = ["check", str(path), "--tokenizer", tokenizer, "--chat-template", "plain", "--max-length", "12"]
    assert main(argv) == 1
    said = capsys.readouterr().out
    assert f"{path}:3: 'response' is empty; write" in said and f"{path}:4: broken JSON" in said
    assert "rows 5 · usable 3 · bad 2" in said
    assert f"1 rows: the same as an earlier row; drop them if they are not meant to repeat ({path}:2 = 1)" in said
    assert f"decomposed Hangul (NFD), which tokenizers see as other letters; run leyden data convert ({path}:5)" in said
    assert f"special token <s>, which the model takes as such; remove it ({path}:5)" in said


def test_check_of_nothing_usable_reports_and_returns_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": ""}\n' * 2, encoding="utf-8")
    assert main(["check", str(path), "--kind", "instruction"]) == 2
    assert "rows 2 · usable 0 · bad 2" in capsys.readouterr().out


def test_check_measures_in_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a tokenizer of bytes a prompt of n letters has the template's letters and n more; the answer adds EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["</s>", *pre_tokenizers.ByteLevel.alphabet()])}, merges=[])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path / "bytes")
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"prompt": "a" * n, "response": "b" * n}) for n in range(1, 21)]
    path.write_text("\n".join(lines), encoding="utf-8")
    argv = [
        "check",
        str(path),
        "--tokenizer",
        str(tmp_path / "bytes"),
        "--chat-template",
        "plain",
        "--max-length",
        "40",
    ]
    assert main(argv) == 0
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    frame = len("User:\n\n\nAssistant:\n")
    assert table["prompt"] == [str(frame + 10), str(frame + 19), str(frame + 20), str(20 * frame + 210)]
    assert table["response"] == ["11", "20", "21", "230"]
    assert table["longer"][:3] == ["than", "40", "tokens:"]
    over = sum(frame + 2 * n + 1 > 40 for n in range(1, 21))
    assert table["longer"][3] == str(over)


def test_check_finds_the_kind_and_judges_by_it(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "b"}\n{"prompt": "a", "chosen": "bb", "rejected": "b"}\n'
    )
    argv = ["check", str(path), "--tokenizer", tokenizer, "--chat-template", "plain"]
    assert main(argv) == 1
    said = capsys.readouterr().out
    assert "preference data as prompt-chosen-rejected" in said and "chosen equals rejected" in said
    assert main([*argv, "--kind", "instruction"]) == 0
    assert main([*argv, "--kind", "prompts"]) == 0


def checked(path: Path, lines: list[Any], capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    code = main(["check", str(path), "--kind", "preference", *flags])
    return code, capsys.readouterr().out


def test_check_counts_pairs_and_says_why_rows_are_bad(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"prompt": "a", "chosen": "long answer", "rejected": "no"}
    flags = ["--tokenizer", tokenizer, "--chat-template", "plain"]
    bad = [pair | {"rejected": " long answer"}, pair | {"rejected": ""}, pair | {"chosen": " "}]
    code, said = checked(tmp_path / "a.jsonl", [pair, pair | {"rejected": "a longer answer"}, *bad], capsys, *flags)
    assert code == 1 and "rows 5 · usable 2 · bad 3 (2 empty response, 1 chosen equals rejected)" in said
    assert "pairs 2 · rows: 2 with 2 responses\n" in said and "margin" not in said and "left out" not in said
    assert "chosen is longer than rejected in 50% of the rows, shorter in 50%" in said
    lines = [pair | {"margin": margin} for margin in (3, 0.5, 2)] + [pair]
    code, said = checked(tmp_path / "b.jsonl", lines, capsys, *flags)
    assert code == 0
    assert "margin of chosen over rejected (3 of 4 rows): least 0.5, median 2, most 3" in said


def test_check_of_more_responses(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokenizer", tokenizer, "--chat-template", "plain"]
    scored = {"prompt": "a", "responses": ["b", "cc", "d"]}
    lines = [scored | {"scores": [1, 2, 3]}, scored | {"scores": [2, 2, 1]}, scored | {"scores": [1, 1, 1]}]
    code, said = checked(tmp_path / "a.jsonl", lines, capsys, *flags)
    assert code == 1 and "bad 1 (1 tied)" in said
    assert "pairs 4 · rows: 1 with 2 responses, 1 with 3 responses" in said
    assert "the best response is longer than the worst in 0% of the rows, shorter in 0%" in said
    assert "margin of the best response over the worst (all rows): least 1, median 2, most 2" in said
    assert "left out: 1 responses that tie with" in said
    ranked = {"prompt": "a", "completion_0": "b", "completion_1": "c", "ranking": [1, 2]}
    with pytest.raises(UserError, match=r"b\.jsonl: a ranking can be read both ways; .*--rank-order"):
        checked(tmp_path / "b.jsonl", [ranked], capsys, *flags)
    code, said = checked(tmp_path / "b.jsonl", [ranked], capsys, *flags, "--rank-order", "lower_is_better")
    assert code == 0 and "pairs 1" in said


@pytest.mark.parametrize(
    "options", [{}, {"min_gap": 0.3}, {"max_responses": 2}, {"min_gap": 0.3, "max_responses": 3}, {"min_gap": 5.0}]
)
def test_check_counts_what_training_compares(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    scores = [[0.3, 0.9, 0.2, 0.5], [1, 1, 1, 0], [0.1, 0.2, 0.15, 0.2], [4, 3, 2, 9]]
    lines: list[Any] = [{"prompt": f"{i}?", "responses": list("abcd"), "scores": row} for i, row in enumerate(scores)]
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    code, said = checked(tmp_path / "a.jsonl", lines, capsys, *flags)
    data = PreferenceData(str(tmp_path / "a.jsonl"), val_fraction=0.0, **options)
    data.trainer = SimpleNamespace(predicting=False, lightning_module=None)  # type: ignore[assignment]
    report = Store(data._stored(str(tmp_path / "a.jsonl"))).report
    assert code == 0 and f"usable {report.kept} · bad 0" in said
    why = f" · left out {4 - report.kept} (" + "".join(f"{n} {reason})" for reason, n in report.dropped.items())
    assert (why in said) == bool(report.dropped) and ("left out:" in said) == bool(report.left_out)
    assert f"left out: {report.left_out} responses that tie" in said or not report.left_out
    trees = [Store(data._stored(str(tmp_path / "a.jsonl")))[i] for i in range(report.kept)]
    assert f"pairs {sum(len(t.responses) * (len(t.responses) - 1) // 2 for t in trees)} ·" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-gap", "-1"], "--min-gap -1"),
        (["--max-responses", "1"], "--max-responses 1: a comparison takes two"),
        (["--max-new-tokens", "8"], "--max-new-tokens 8: the answer's part of --max-length; give both"),
        (["--max-length", "9", "--max-new-tokens", "8"], "prompts need room for an answer, these are instruction data"),
        (["--min-gap", "0.5"], "of preferences, these are instruction data; --kind preference"),
    ],
)
def test_check_says_which_rows_an_option_is_for(tmp_path: Path, flags: list[str], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)):
        main(["check", str(path), *flags])


def test_check_warns_of_rows_that_contradict_each_other(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, flags = tmp_path / "a.jsonl", ["--tokenizer", tokenizer, "--chat-template", "plain"]
    lines = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "z", "chosen": "c", "rejected": "b"},  # of another prompt
        {"prompt": "a", "chosen": "c ", "rejected": "b"},
        {"prompt": "a", "responses": ["d", "b", "c"], "scores": [3, 2, 1]},
    ]
    code, said = checked(path, lines[:3], capsys, *flags)
    warning = "two answers compared the other way round than in an earlier row; keep the one that is right"
    assert code == 0 and f"warning: 1 rows: {warning} ({path}:3 against 1)" in said
    assert warning not in checked(path, [lines[0], lines[1], lines[0]], capsys, *flags)[1]


TURNS = [{"role": "user", "content": "What is rain?"}, {"role": "assistant", "content": "It's water."}]
WORSE = [TURNS[0], {"role": "assistant", "content": "Dry."}]


@pytest.mark.parametrize("prompt", ["What is rain?", json.dumps(TURNS[:1])])
@pytest.mark.parametrize("since", [0, 1])
def test_conversations_in_cells_are_conversations(
    tmp_path: Path, since: int, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`chosen` and `rejected` of a table that hold the whole conversation as JSON, or only the answer; prompts too."""
    path = tmp_path / "a.csv"
    cells = [prompt, json.dumps(TURNS[since:]), json.dumps(WORSE[since:])]
    path.write_text("prompt,chosen,rejected\n" + ",".join('"' + cell.replace('"', '""') + '"' for cell in cells))
    _, examples = Source(str(path), kind="preference").examples(lambda note: None)
    ((_, example),) = examples
    assert isinstance(example, Example)
    assert example.messages == TURNS[:1] and example.responses == [TURNS[1:], WORSE[1:]]
    assert main(["check", str(path), "--kind", "preference"]) == 0 and "usable 1" in capsys.readouterr().out


@pytest.mark.parametrize("turns", [repr(TURNS), "[" + "\n ".join(map(repr, TURNS)) + "]"])
def test_conversations_as_python_prints_them_are_bad_rows(
    tmp_path: Path, turns: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for name in ("prompt", "chosen"):
        code, said = checked(tmp_path / "a.jsonl", [good, good | {name: turns}], capsys)
        assert code == 1 and f"'{name}' holds turns as Python prints them, not JSON; write json.dumps(turns" in said


def test_json_that_is_no_conversation_stays_a_text(tmp_path: Path) -> None:
    for text in (
        '[{"name": "Kim", "role": "director"}]',
        '[{"from": "Seoul", "value": 3}]',
        "[1, 2]",
        "[]",
        "[{'a': 1}]",
    ):
        turns = [{"role": "assistant", "content": text}]
        assert turns_of(text, "response", "assistant") == turns


def test_columns_of_rows_that_are_put_together_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = [
        {"Message_ID": "a", "Parent_ID": None, "Role": "prompter", "Text": "2+2?"},
        {"Message_ID": "b", "Parent_ID": "a", "Role": "assistant", "Text": "4", "Note": "do not train on this"},
        {"Message_ID": "c", "Parent_ID": "a", "Role": "assistant", "Text": "gone", "Deleted": True},
        {"Message_ID": "d", "Parent_ID": "c", "Role": "prompter", "Text": "why?"},
        {"Message_ID": "e", "Parent_ID": "d", "Role": "assistant", "Text": "so."},
    ]
    scored = [
        {"prompt": "a", "response": "b", "score": 1},
        {"prompt": "a", "response": "c", "score": 2, "note": "do not train on this"},
    ]
    path = tmp_path / "a.jsonl"
    for lines, kind, name in ((tree, "instruction", "Note"), (scored, "preference", "note")):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        assert main(["check", str(path), "--kind", kind]) == 0
        said = capsys.readouterr().out
        assert f"warning: not read, though there is text in it: {name} (1 row)" in said and "Deleted (" not in said
        assert "usable 1" in said and ("2 messages that are deleted" in said) == (kind == "instruction")


def test_check_of_candidates_needs_no_ranks(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "responses": ["b", "b"]}\n{"prompt": "a", "responses": ["b", ""]}\n')
    argv = [str(path), "--kind", "candidates", "--tokenizer", tokenizer, "--chat-template", "plain"]
    assert main(["check", *argv]) == 1
    said = capsys.readouterr().out
    assert "candidates data as scored (prompt, responses)" in said and "bad 1 (1 empty response)" in said
    assert main(["show", *argv, "--rows", "1"]) == 0
    assert "-- response 2 of 2\n" in capsys.readouterr().out


def test_check_reports_a_template_that_refuses(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "no", "response": "b"}\n')
    refuse = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    assert main(["check", str(path), "--tokenizer", tokenizer, "--chat-template", refuse]) == 1
    assert f"{path}:2: the chat template refuses the conversation (not this)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data.chat_template plain"):
        main(["check", str(path), "--tokenizer", tokenizer])


# show


def shown(path: Path, tokenizer: str, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=200, soft_wrap=True, **options)
    source = Source(str(path), tokenizer=tokenizer, chat_template=THINKING)
    assert show(source, 1, console) == 0
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def test_show_marks_what_is_trained(tmp_path: Path, tokenizer: str) -> None:
    turns = [{"role": role, "content": role[0] * 2} for role in ("user", "assistant", "user", "assistant")]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    said = shown(path, tokenizer)
    assert "⟦aa<|im_end|>⟧⟨↵\n<|im_start|>user↵\nuu<|im_end|>↵\n<|im_start|>assistant↵\n⟩⟦<think>" in said
    coloured = shown(path, tokenizer, force_terminal=True, color_system="truecolor", no_color=False)
    assert "⟦" not in coloured and "\x1b[1;32maa<|im_end|>" in coloured
    assert main(["show", str(path), "--tokenizer", tokenizer, "--chat-template", "plain", "--kind", "prompts"]) == 0


def test_show_marks_best_and_worst_with_their_scores(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2.5, -3]}))
    said = shown(path, tokenizer)
    places = [said.index(f"-- response {part}") for part in ("1 of 3 (best, score 2.5)", "2 of 3 (score 1)")]
    places += [said.index("-- response 3 of 3 (worst, score -3)")]
    assert places == sorted(places)
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    said = shown(path, tokenizer)
    assert "1 of 2 (best)" in said and "2 of 2 (worst)" in said


# the verbs


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chekc"], "did you mean 'check'"),
        (["check"], "required: FILE"),
        (["check", "a.csv", "--tokeniser", "x"], "did you mean '--tokenizer'"),
        (["check", "a.csv", "--kind", "preferences"], "did you mean 'preference'"),
        (["check", "a.csv", "--rank-order", "lower"], "--rank-order lower: use lower_is_better, higher_is_better"),
        (["sample", "--noise", "0.2"], "instruction rows have no labels"),
        (["sample", "--kind", "preferences"], "did you mean 'preference'"),
        (["convert", "nowhere.csv"], "no such file"),
        (["convert", "a.csv", "b.jsonl", "c"], "'c' is not known"),
        (["show", "a.csv", "--rows", "x"], "argument --rows: invalid int value"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in commands.VERBS)
    assert set(commands.VERBS) == {usage.split()[0] for usage in commands.USAGE}


def test_sample_writes_a_whole_file_once(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    argv = ["sample", "--kind", "instruction", "--language", "ko", "--rows", "5", "--output", str(path)]
    assert main(argv) == 0 and len(rows(path)) == 5
    with pytest.raises(UserError, match="exists already"):
        main(argv)


@pytest.mark.parametrize(("ending", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_sample_writes_tables_that_convert_back(tmp_path: Path, ending: str, delimiter: str) -> None:
    table, plain, back = tmp_path / f"s{ending}", tmp_path / "plain.jsonl", tmp_path / "back.jsonl"
    for path in (table, plain):
        assert main(["sample", "--language", "both", "--rows", "30", "--output", str(path)]) == 0
    assert delimiter in table.read_text(encoding="utf-8").splitlines()[0]
    assert main(["convert", str(table), str(back)]) == 0
    assert rows(back) == rows(plain)


@pytest.mark.parametrize("count", ["2", "4"])
def test_sampled_preferences_survive_a_table(tmp_path: Path, count: str, capsys: pytest.CaptureFixture[str]) -> None:
    table, plain, back = tmp_path / "s.csv", tmp_path / "plain.jsonl", tmp_path / "back.jsonl"
    for path in (table, plain):
        flags = ["--kind", "preference", "--responses", count, "--noise", "0.2", "--language", "both", "--rows", "20"]
        assert main(["sample", *flags, "--output", str(path)]) == 0
    assert main(["convert", str(table), str(back)]) == 0
    names = ("prompt", "chosen", "rejected", "responses", "scores", "language", "answer", "rivals")
    kept = [[{name: row.get(name) for name in names} for row in rows(path)] for path in (back, plain)]
    assert kept[0] == kept[1] and len(kept[0]) == 20
    capsys.readouterr()
    assert main(["check", str(back)]) == 0
    said = capsys.readouterr().out
    assert "preference data as" in said and "rows 20 · usable 20" in said
    assert ("margin" in said) == (count == "4")  # the true reward of a pair is no margin of its noisy label


def test_convert_needs_nothing_heavy(table: Path) -> None:
    code = (
        "import sys; from leyden.datamodules.commands.main import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'lightning', 'datasets', 'pandas'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "convert", str(table)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
