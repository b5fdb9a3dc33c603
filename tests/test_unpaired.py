"""Single answers with labels: read, checked, converted, sampled, shown, and given to algorithms that take them."""

from __future__ import annotations

import json
import re
from collections import Counter
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from leyden.algos import BCO, DPO, KTO
from leyden.batch.forest import pack
from leyden.datamodules import PreferenceData
from leyden.datamodules.commands.check import check
from leyden.datamodules.commands.convert import Conversion, convert
from leyden.datamodules.commands.main import main
from leyden.datamodules.commands.show import show
from leyden.datamodules.formats.formats import detect, parse
from leyden.datamodules.formats.row_error import RowError
from leyden.datamodules.sample import sample_rows
from leyden.datamodules.source import Source
from leyden.datamodules.storage.mismatched import lenders
from leyden.errors import UserError
from leyden.models import CausalLM

ROWS = [{"prompt": f"질문 {i}?", "completion": f"답 {i}.", "label": i % 3 == 0} for i in range(12)]
PAIRS = [{"prompt": f"질문 {i}?", "chosen": f"맞는 답 {i}.", "rejected": f"틀린 답 {i}."} for i in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEYDEN_CACHE", str(tmp_path / "cache"))


def written(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def set_up(algorithm: Any, path: Any, stage: str = "fit", **options: Any) -> PreferenceData:
    """The data as a Trainer with this algorithm has them."""
    data = PreferenceData(path, **({"batch_size": 2, "val_fraction": 0.0} | options))
    module = SimpleNamespace(
        policy=CausalLM("tiny"), unpaired=algorithm.__dict__.get("unpaired", getattr(algorithm, "unpaired", False)),
        mismatched=getattr(algorithm, "mismatched", False),
    )  # fmt: skip
    trainer: Any = SimpleNamespace(
        lightning_module=module, predicting=False, validating=False, testing=False, world_size=1, global_rank=0,
        accumulate_grad_batches=1, limit_train_batches=1.0, default_root_dir=path if isinstance(path, str) else ".",
    )  # fmt: skip
    data.trainer = trainer
    data.prepare_data()
    data.setup(stage)
    return data


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "good"),
    [
        ({"prompt": "a?", "response": "b", "label": True}, 1.0),
        ({"prompt": "a?", "completion": "b", "label": False}, 0.0),
        ({"question": "a?", "answer": "b", "kto_tag": "bad"}, 0.0),
        ({"질문": "a?", "답변": "b", "is_good": 1}, 1.0),
        ({"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}], "label": -1}, 0.0),
        ({"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}], "liked": "yes"}, 1.0),
    ],
)
def test_rows_with_a_label(row: dict[str, Any], good: float) -> None:
    example = parse(row, detect([row], "unpaired"), "unpaired")
    assert [turn["content"] for turn in example.messages] == ["a?"] and example.scores == [good]
    assert [turn["content"] for response in example.responses for turn in response] == ["b"]


def test_columns_named_otherwise() -> None:
    columns = {"prompt": "물었다", "response": "말했다", "label": "좋다"}
    row = {"물었다": "a?", "말했다": "b", "좋다": "bad"}
    assert parse(row, detect([row], "unpaired", columns), "unpaired", columns).scores == [0.0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a?", "chosen": "good", "rejected": "bad"},
        {"prompt": "a?", "responses": ["so so", "bad", "good"], "scores": [0.5, 0.1, 3.0]},
        {"context": "a?", "response1": "bad", "response2": "good", "overall_preference": 2},
    ],
)
def test_compared_answers_are_a_good_and_a_bad_one(row: dict[str, Any]) -> None:
    example = parse(row, detect([row], "unpaired"), "unpaired")
    said = [turn["content"] for response in example.responses for turn in response]
    assert said == ["good", "bad"] and example.scores == [1.0, 0.0]
    assert example.left_out == len(row.get("responses", said)) - 2


@pytest.mark.parametrize("label", ["perhaps", 0.5, 7, None, ""])
def test_a_label_that_says_nothing_is_a_bad_row(label: Any) -> None:
    row = {"prompt": "a?", "response": "b", "label": label}
    with pytest.raises(RowError, match="'label' is .*neither good .true, 1. nor bad .false, 0.; mend it, or drop the"):
        parse(row, "unpaired", "unpaired")


def test_rows_that_are_no_unpaired_data_say_what_to_type() -> None:
    with pytest.raises(UserError, match="no unpaired format fits the columns prompt, response; .*--label COLUMN"):
        detect([{"prompt": "a?", "response": "b"}], "unpaired")


def test_unpaired_rows_for_pairs_say_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="single answers .prompt, response, label.*--config kto .*--config sft"):
        set_up(DPO, written(tmp_path, ROWS))


# -- what algorithms are given ----------------------------------------------------------------------------------------


def test_bco_is_given_single_answers_with_their_labels(tmp_path: Path) -> None:
    data = set_up(BCO, written(tmp_path, ROWS))
    assert data.train_trees is not None and len(data.train_trees) == 12
    trees = [data.train_trees[i] for i in range(12)]
    assert [tree.scores for tree in trees] == [[float(row["label"])] for row in ROWS]
    assert all(len(tree.responses) == 1 for tree in trees)


def test_pairs_become_a_good_and_a_bad_answer(tmp_path: Path) -> None:
    data = set_up(BCO, written(tmp_path, PAIRS))
    assert data.train_trees is not None and len(data.train_trees) == 12
    trees = [data.train_trees[i] for i in range(12)]
    assert [tree.scores for tree in trees] == [[1.0], [0.0]] * 6
    said = [data.template.tokenizer.decode(tree.responses[0]) for tree in trees]
    assert "맞는 답 0" in said[0] and "틀린 답 0" in said[1]
    assert [data.source(tree.row).rpartition(":")[2] for tree in trees[:4]] == ["1", "1", "2", "2"]
    assert data._stores[0].report.left_out == 0


def test_an_answer_that_is_too_long_takes_no_other_with_it(tmp_path: Path) -> None:
    long = "word " * 80
    rows = [
        {"prompt": "a?", "chosen": "fine", "rejected": long},
        {"prompt": "b?", "chosen": long, "rejected": "bad"},
        {"prompt": "c?", "chosen": long, "rejected": long + "no"},
    ]
    data = set_up(KTO, written(tmp_path, rows * 2), max_length=64, val_fraction=0)
    scores = Counter(tree.scores[0] for tree in (data.train_trees[i] for i in range(len(data.train_trees))))
    assert scores == {1.0: 2, 0.0: 2}


def test_dpo_still_compares(tmp_path: Path) -> None:
    data = set_up(DPO, written(tmp_path, PAIRS))
    assert data.kind == "preference" and data.train_trees is not None and len(data.train_trees[0].responses) == 2


@pytest.mark.parametrize("rows", [ROWS, PAIRS])
def test_kto_borrows_an_answer_to_another_prompt(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plain, data = (set_up(kind, written(tmp_path, rows)) for kind in (BCO, KTO))
    own, trees = plain.train_trees, data.train_trees
    assert own is not None and trees is not None and len(own) == len(trees) == 12
    said = {tuple(own[i].responses[0]): tuple(own[i].prompt) for i in range(12)}
    for i in range(12):
        tree = trees[i]
        assert tree.prompt == own[i].prompt and tree.responses[0] == own[i].responses[0]
        assert said[tuple(tree.responses[1])] != tuple(tree.prompt), "its own prompt's"
        assert tree.scores is not None and tree.scores[0] == own[i].scores[0] and tree.scores[1] != tree.scores[1]
        assert len(tree) == trees.lengths[i] and tree.totals() == trees.totals[i] == own.totals[i]
    again = set_up(KTO, written(tmp_path, rows), seed=5).train_trees
    assert again is not None and [again[i].responses for i in range(12)] == [trees[i].responses for i in range(12)]
    assert data.fingerprint != plain.fingerprint
    batch = pack([trees[i] for i in range(4)])
    assert batch.totals.responses == 4 and len(batch.group) == 8


def test_what_is_borrowed_is_cut_to_the_room_that_there_is(tmp_path: Path) -> None:
    rows = [
        {"prompt": "긴 질문 " * 20, "response": "짧다", "label": True},
        {"prompt": "짧다", "response": "긴 답 " * 20, "label": False},
    ]
    data = set_up(KTO, written(tmp_path, rows))
    trees = data.train_trees
    assert trees is not None
    for i in range(2):
        assert max(len(trees[i].prompt) + len(r) for r in trees[i].responses) <= data.longest_row
        assert len(trees[i]) == trees.lengths[i]
    planned = PreferenceData(written(tmp_path, rows))
    planned.read_for(KTO)
    lengths, longest = planned.row_lengths()
    assert longest == data.longest_row and lengths == list(trees.lengths)


def test_lenders_are_others_with_another_prompt() -> None:
    prompts = ["a", "a", "b", "c", "c", "c", "d"] * 5
    found = lenders(prompts)
    assert all(prompts[row] != prompts[lender] for row, lender in enumerate(found))
    assert found == lenders(prompts) and max(Counter(found).values()) <= 12
    assert lenders(["a"]) == [0] and set(lenders(["a"] * 4)) <= set(range(4)) and lenders([]) == []
    assert sorted(lenders(list("abcdefgh"))) == list(range(8)), "each is lent once"


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_alike_are_refused(tmp_path: Path, label: bool) -> None:
    file = written(tmp_path, [row | {"label": label} for row in ROWS])
    word, other = ("good", "bad") if label else ("bad", "good")
    with pytest.raises(UserError, match=f"rows.jsonl: all 12 answers are labelled {word}; add {other} ones"):
        set_up(KTO, file)
    both = [file, written(tmp_path, ROWS, "more.jsonl")]
    assert set_up(KTO, both).train_trees is not None, "together they are not alike"


@pytest.mark.parametrize("option", [{"min_gap": 0.5}, {"max_responses": 2}])
def test_options_of_comparisons_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--data.{[*option][0]}: of responses that are compared"):
        set_up(KTO, written(tmp_path, ROWS), **option)


def test_rows_of_one_prompt_are_held_out_together(tmp_path: Path) -> None:
    data = set_up(KTO, written(tmp_path, PAIRS), val_fraction=0.3)
    assert data.train_trees is not None and data.val_trees is not None
    train, held = ({tuple(t[i].prompt) for i in range(len(t))} for t in (data.train_trees, data.val_trees))
    assert len(data.val_trees) == 4 and not train & held
    lent = [data.val_trees[i].responses[1] for i in range(4)]
    assert all(response in [data.val_trees[i].responses[0] for i in range(4)] for response in lent)


# -- leyden data ------------------------------------------------------------------------------------------------------


def test_check_counts_labels(tmp_path: Path) -> None:
    lines: list[str] = []
    opposite = {"prompt": "질문 0?", "completion": "답 0.", "label": False}
    assert check(Source(written(tmp_path, [*ROWS, opposite]), "unpaired"), say=lines.append) == 0
    text = "\n".join(lines)
    assert "labels: 4 good, 9 bad" in text and "rows 13 · usable 13" in text
    assert "an answer labelled otherwise than in an earlier row" in text and "the same as an earlier row" not in text
    lines.clear()
    alike = [row | {"label": 1} for row in ROWS]
    assert check(Source(written(tmp_path, alike), "unpaired"), say=lines.append) == 2
    assert any("error: all answers are labelled alike" in line and "add bad ones" in line for line in lines)


def test_check_names_bad_rows(tmp_path: Path) -> None:
    lines: list[str] = []
    file = written(tmp_path, [*ROWS, {"prompt": "q", "completion": "a", "label": "maybe"}])
    assert check(Source(file, "unpaired"), say=lines.append) == 1
    assert any("rows.jsonl:13: 'label' is 'maybe'" in line for line in lines)


def test_show_says_what_is_good(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=StringIO(), force_terminal=False)
    assert show(Source(written(tmp_path, ROWS), "unpaired"), 2, console) == 0
    text = console.export_text()
    assert text.index("(good)") < text.index("답 0") < text.index("(bad)") < text.index("답 1")


def test_convert_names_the_columns(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("물음,말,좋음\n하나?,둘,true\n셋?,넷,false\n", encoding="utf-8")
    out, lines = tmp_path / "t.jsonl", list[str]()
    columns = {"prompt": "물음", "response": "말", "label": "좋음"}
    assert convert(str(table), str(out), Conversion(columns), lines.append) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"prompt": "하나?", "response": "둘", "label": "true"} and "unpaired data" in lines[-1]
    assert main(["convert", str(table), str(tmp_path / "u.jsonl"), "--prompt", "물음", "--response", "말",
                 "--label", "좋음"]) == 0  # fmt: skip
    assert main(["check", "--kind", "unpaired", str(tmp_path / "u.jsonl")]) == 0


def test_sampled_rows_have_labels_and_can_be_used(tmp_path: Path) -> None:
    rows = list(sample_rows("unpaired", "both", 200, 1, noise=0.0))
    assert {"prompt", "response", "label", "gold"} <= set(rows[0]) and 60 < sum(row["label"] for row in rows) < 140
    good, bad = ([row["gold"] for row in rows if row["label"] is label] for label in (True, False))
    assert sum(good) / len(good) > sum(bad) / len(bad) + 0.25
    assert list(sample_rows("unpaired", "both", 20, 1, noise=0.0)) == rows[:20]
    assert main(["sample", "--kind", "unpaired", "--rows", "20", "--output", str(tmp_path / "s.csv")]) == 0
    assert main(["check", "--kind", "unpaired", str(tmp_path / "s.csv")]) == 0
    with pytest.raises(UserError, match="one answer each"):
        next(sample_rows("unpaired", "ko", 1, 1, responses=3))


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config kto --data.path answers.jsonl", "answers.jsonl: no unpaired format fits .*--label COLUMN"),
        ("--config bco --data.path good.jsonl", "good.jsonl: all 12 answers are labelled good; add bad ones"),
        ("--config dpo --data.path rows.jsonl", "rows.jsonl: the rows hold single answers .*--config kto"),
        ("--config reward_model --data.path rows.jsonl", "rows.jsonl: the rows hold single answers .*--config kto"),
        ("--config kto --data.path rows.jsonl --data.min_gap 1", "--data.min_gap: of responses that are compared"),
        ("--config kto --data.path rows.jsonl --model.objective Hinge", "KTO has no key 'objective'"),
        ("--config dpo --data.path pairs.jsonl --model.objective SimPO --model.reference copy", "copy: ignored"),
        (
            "--config dpo --data.path pairs.jsonl --model.objective SimPO --model.objective.label_smoothing 0.1",
            "no key",
        ),
        ("--config dpo --data.path pairs.jsonl --model.objective Hinge --model.objective.gamma 1", "no key 'gamma'"),
        ("--config dpo --data.path pairs.jsonl --model.gamma 1", "DPO has no key 'gamma'"),
    ],
)
def test_mistakes_are_one_line(flags: str, message: str, leyden: Any, workplace: Path) -> None:
    good = [row | {"label": True} for row in ROWS]
    answers = [{"prompt": row["prompt"], "response": row["completion"]} for row in ROWS]
    for name, rows in {"rows": ROWS, "pairs": PAIRS, "good": good, "answers": answers}.items():
        written(workplace, rows, f"{name}.jsonl")
    code, _, error = leyden("fit", *flags.split(), "--trainer.accelerator", "cpu", "--trainer.max_steps", "1")
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and re.search(message, lines[0]), error


@pytest.mark.parametrize("config", ["kto", "bco"])
def test_from_a_file_to_an_export(config: str, leyden: Any, workplace: Path) -> None:
    written(workplace, ROWS, "rows.jsonl")
    flags = ["--data.path", "rows.jsonl", "--data.batch_size", "4", "--data.val_fraction", "0.2"]
    run = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.default_root_dir", "run"]
    code, _, error = leyden("fit", "--config", config, *flags, *run)
    assert code == 0 and "unpaired data as unpaired" in error, error
    assert (workplace / "run/export/model.safetensors").is_file()
    header = (workplace / "run/metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert {"train/accuracy", "train/margin", "val/chosen_reward", "train/good_share"} <= set(header)
    assert ("train/kl" in header) is (config == "kto")
