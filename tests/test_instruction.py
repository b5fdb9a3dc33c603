"""InstructionData: what becomes of rows, the cache, splits, mixtures and prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from chat_brothers import QWEN3
from prepared import prepared, write

from leyden.batch.forest import Tree
from leyden.datamodules import InstructionData
from leyden.datamodules import file_data as module
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.storage.truncation import cut_text, fit
from leyden.errors import UserError

ROWS = [{"prompt": f"{i} 더하기 {i}는?", "response": f"{2 * i}입니다."} for i in range(20)]


def ready(path: Any, tmp_path: Path, stage: str = "fit", **options: Any) -> InstructionData:
    return prepared(InstructionData(path, **options), tmp_path, stage)


def texts(data: InstructionData, trees: Any) -> list[str]:
    tokenizer = data.template.tokenizer
    return [tokenizer.decode(trees[i].responses[0], skip_special_tokens=True) for i in range(len(trees))]


def test_rows_become_trees_that_spell_them(tmp_path: Path) -> None:
    data = ready(write(tmp_path / "a.jsonl", ROWS), tmp_path, val_fraction=0.0)
    assert data.train_trees is not None
    assert texts(data, data.train_trees) == [row["response"] for row in ROWS]
    tree = data.train_trees[3]
    assert tree.prompt == data.template.prompt([{"role": "user", "content": ROWS[3]["prompt"]}])
    assert tree.weights == [[1.0] * len(tree.responses[0])] and tree.responses[0][-1] in data.template.stop
    assert data.source(tree.row).endswith("a.jsonl:4")
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch.row.tolist()) == list(range(20)) and batch.totals.prompts == 20


def test_the_cache_is_used_and_keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    built: list[Path] = []
    build = module.build
    monkeypatch.setattr(module, "build", lambda to, rows: (built.append(to), build(to, rows)))
    for options in ({}, {}, {"max_length": 50}, {"train_on": "all"}, {"system_prompt": "간단히."}):
        ready(path, tmp_path, **options)
    assert len(built) == 4 and len(set(built)) == 4
    write(tmp_path / "a.jsonl", ROWS[:-1])
    assert len(ready(path, tmp_path, val_fraction=0).train_rows()) == 19 and len(built) == 5


def test_nothing_is_left_of_a_cache_that_could_not_be_finished(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": "?", "response": ""}])
    with pytest.raises(UserError, match=r"a\.jsonl:21: .*empty.*--data\.on_error skip"):
        ready(path, tmp_path)
    assert not list(Path(os.environ["LEYDEN_CACHE"]).iterdir())


def test_bad_rows_are_left_out_and_listed_when_asked(tmp_path: Path) -> None:
    bad = [{"prompt": "?", "response": ""}, {"prompt": 3}]
    path = write(tmp_path / "a.jsonl", [*ROWS, *bad])
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"prompt": "half')
    with pytest.raises(UserError, match=r"a\.jsonl:\d+: .* \(2 more rows are bad\)"):
        ready(path, tmp_path)
    for _ in range(2):  # the second time from the cache
        data = ready(path, tmp_path, on_error="skip", val_fraction=0)
        assert len(data.train_rows()) == 20
        listed = (tmp_path / "run" / "a.rejected.jsonl").read_text(encoding="utf-8").splitlines()
        assert sorted(json.loads(line)["source"].rpartition(":")[2] for line in listed) == ["21", "22", "23"]
        (tmp_path / "run" / "a.rejected.jsonl").unlink()


def test_a_fraction_is_held_out_whatever_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    splits = []
    for seed in (0, 0, 1):
        data = ready(path, tmp_path, val_fraction=0.2, seed=seed)
        train, held = texts(data, data.train_trees), texts(data, data.val_trees)
        assert len(held) == 4 and sorted(train + held) == sorted(row["response"] for row in ROWS)
        splits.append(held)
    assert splits[0] == splits[1] == splits[2], "runs of other seeds are measured on the same rows"


def test_equal_rows_are_held_out_together(tmp_path: Path) -> None:
    """A row that stands twice, or in two files of a folder, is trained on or measured on, never both."""
    folder = tmp_path / "ds"
    folder.mkdir()
    write(folder / "a.jsonl", [*ROWS, *ROWS[:5]])
    write(folder / "b.jsonl", ROWS[::-1])
    data = ready(str(folder), tmp_path, val_fraction=0.2)
    train, held = texts(data, data.train_trees), texts(data, data.val_trees)
    assert len(train) + len(held) == 45 and len(set(held)) == 4 and not set(train) & set(held)


def test_validation_and_test_files(tmp_path: Path) -> None:
    train, val, test = (
        write(tmp_path / f"{n}.jsonl", ROWS[a:b]) for n, a, b in (("a", 0, 9), ("b", 9, 14), ("c", 14, 20))
    )
    data = ready(train, tmp_path, val_path=val, test_path=test)
    assert [len(t or ()) for t in (data.train_trees, data.val_trees, data.test_trees)] == [9, 5, 6]
    assert data.source(9).endswith("b.jsonl:1") and data.source(19).endswith("c.jsonl:6")
    assert data.test_trees is not None and data.test_trees[0].row == 14


def test_files_mix_by_weight(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", ROWS[:10]), write(tmp_path / "b.jsonl", ROWS[10:])
    data = ready({one: 2, two: 0.5}, tmp_path, val_fraction=0)
    rows = list(data.train_rows())
    assert [rows.count(i) for i in range(10)] == [2] * 10 and len(rows) == 25
    assert len({r for r in rows if r >= 10}) == 5


def test_overlength_policies() -> None:
    tree = Tree([9, 1, 2, 3, 4], [[5, 6, 7]], weights=[[0.0, 1.0, 1.0]])
    assert fit(tree, 8, "drop") is tree
    with pytest.raises(LeftOut, match="too long"):
        fit(tree, 7, "drop")
    cut = fit(tree, 6, "truncate_prompt")
    assert cut.prompt == [9, 3, 4] and cut.responses == tree.responses
    cut = fit(tree, 7, "truncate_response")
    assert cut.responses == [[5, 6]] and cut.weights == [[0.0, 1.0]]
    for policy, length in (("error", 7), ("truncate_prompt", 4), ("truncate_response", 6)):
        with pytest.raises(RowError):
            fit(tree, length, policy)  # type: ignore[arg-type]


def test_long_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": "긴 글?", "response": "길다 " * 200}])
    with caplog.at_level("INFO", "leyden"):
        assert len(ready(path, tmp_path, max_length=100, val_fraction=0).train_rows()) == 20
        assert "20 rows kept, dropped: 1 too long" in caplog.text
        data = ready(path, tmp_path, max_length=100, overlength="truncate_response", val_fraction=0)
        assert len(data.train_rows()) == 21 and "1 truncated" in caplog.text
    assert max(data.train_trees.lengths) == 100  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"a\.jsonl:21: \d+ tokens, 100 fit"):
        ready(path, tmp_path, max_length=100, overlength="error")


@pytest.mark.parametrize("prompt", [[], [1]])
def test_pieces_of_a_long_text_predict_each_token_once(prompt: list[int]) -> None:
    text = list(range(2, 25))
    cut = cut_text(Tree(prompt, [text], weights=[[1.0] * len(text)], row=3), 7)
    assert [t for p in cut for t in p.responses[0]] == text and max(map(len, cut)) <= 7
    for before, after in zip(cut, cut[1:], strict=False):
        assert after.prompt == [before.responses[0][-1]] and after.row == 3
    assert sum(p.totals().tokens for p in cut) == len(text) - (not prompt)


def test_text_is_cut_and_all_of_it_trained(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "가나다라마바사 " * 60}, {"text": "짧다"}])
    data = ready(path, tmp_path, max_length=64, val_fraction=0, train_on="all")
    assert data.train_trees is not None and len(data.train_trees) > 3
    ids = [t for i in range(len(data.train_trees) - 1) for t in data.train_trees[i].responses[0]]
    tokenizer = data.template.tokenizer
    assert tokenizer.decode(ids, skip_special_tokens=True) == "가나다라마바사 " * 60
    assert ids[-1] == tokenizer.eos_token_id


def test_later_turns_of_others_are_not_trained(tmp_path: Path) -> None:
    turns = [("user", "안녕?"), ("assistant", "안녕하세요."), ("user", "이름은?"), ("assistant", "라이덴입니다.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = ready(write(tmp_path / "a.jsonl", [row]), tmp_path, val_fraction=0)
    assert data.train_trees is not None
    tree = data.train_trees[0]
    trained = [t for t, w in zip(tree.responses[0], (tree.weights or [])[0], strict=True) if w]
    said = data.template.tokenizer.decode(trained, skip_special_tokens=True)
    assert said == "안녕하세요.라이덴입니다."


def test_no_rows_left_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training rows are left"):
        ready(write(tmp_path / "a.jsonl", ROWS), tmp_path, max_length=5, val_fraction=0)


def test_prompts_for_predict_come_from_any_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:5])
    data = ready(path, tmp_path, "predict", predict_size=2)
    chunks = list(data.predict_dataloader())
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    example, ids = chunks[2][0]
    assert (
        example.messages == [{"role": "user", "content": ROWS[4]["prompt"]}] and example.row["response"] == "8입니다."
    )
    assert ids == data.template.prompt(example.messages)


@pytest.mark.parametrize(
    ("options", "message"), [(dict(val_fraction=1.5), "val_fraction"), (dict(batch_size=0), "batch_size")]
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InstructionData("a.jsonl", **options)


def test_pieces_of_one_text_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "가나다라 " * 40} for i in range(6)]
    data = ready(write(tmp_path / "a.jsonl", rows), tmp_path, max_length=32, val_fraction=0.4)
    places = [
        {data.source(trees[i].row) for i in range(len(trees))} for trees in (data.train_trees, data.val_trees) if trees
    ]
    assert len(places[0]) == 4 and len(places[1]) == 2 and not places[0] & places[1]


def test_a_length_that_holds_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="give 2 or more"):
        InstructionData("a.jsonl", max_length=1)


def test_bad_prompts_are_left_out_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS[:2], {"prompt": ""}])
    with pytest.raises(UserError, match=r"a\.jsonl:3: .*on_error skip"):
        ready(path, tmp_path, "predict").predict_dataloader()
    kept = ready(path, tmp_path, "predict", on_error="skip").predict_dataloader()
    assert sum(len(chunk) for chunk in kept) == 2


def test_rows_that_are_held_out_elsewhere_are_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By whatever name: a folder that holds the validation file, a link to it, or the same rows in another format."""
    folder = tmp_path / "ds"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:12])
    val = write(folder / "val.jsonl", ROWS[12:])
    (folder / "link.jsonl").symlink_to(val)
    (folder / "copy.json").write_text(json.dumps(ROWS[12:15]), encoding="utf-8")
    with caplog.at_level("INFO", "leyden"):
        data = ready(str(folder), tmp_path, val_path=val)
    assert texts(data, data.train_trees) == [row["response"] for row in ROWS[:12]]
    assert len(data.val_trees or ()) == 8 and f"{folder}: 19 rows are held out too, and not trained on" in caplog.text
    with pytest.raises(UserError, match=r"link\.jsonl: all of its 8 rows are held out too"):
        ready(str(folder / "link.jsonl"), tmp_path, val_path=val)


def test_arguments_of_the_template_key_the_cache_and_are_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    path, prompts = write(tmp_path / "a.jsonl", [{"messages": talk}]), []
    for args in ({}, {"enable_thinking": False}):
        caplog.clear()
        options = {"chat_template": QWEN3, "chat_template_args": args, "val_fraction": 0.0}
        with caplog.at_level("INFO", logger="leyden"):
            data = ready(path, tmp_path, **options)  # type: ignore[arg-type]
        assert data.train_trees is not None
        prompts.append(data.template.tokenizer.decode(data.train_trees[0].prompt))
        assert ("1 row: the chat template writes earlier answers otherwise" in caplog.text) == bool(args)
    assert prompts[1].endswith("<think>\n\n</think>\n\n") and not prompts[0].endswith("</think>\n\n")
    assert data.chat_template == data.template.source != QWEN3
    with pytest.raises(UserError, match="chat_template_args thinking: .*; it has enable_thinking"):
        ready(path, tmp_path, chat_template=QWEN3, chat_template_args={"thinking": False})
    own = ready(path, tmp_path, val_fraction=0.0)
    assert own.chat_template is None
