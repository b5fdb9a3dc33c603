"""PreferenceData: what is compared with what, what is left out and why, and responses that wait for a score."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from prepared import prepared, write
from torch import Tensor

from leyden.batch.forest import Batch, Tree
from leyden.datamodules import InstructionData, PreferenceData
from leyden.datamodules import file_data as module
from leyden.datamodules.formats.ranking import above_gap, best_first, spread, without_repeats
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.storage.truncation import fit
from leyden.errors import UserError

PAIRS = [
    {"prompt": f"{i} 더하기 {i}는?", "chosen": f"{2 * i}입니다.", "rejected": f"{2 * i + 1}이야."} for i in range(20)
]
KO = {"prompt": "수도는?", "completion_0": "부산", "completion_1": "서울", "completion_2": "제주", "ranking": [2, 1, 0]}
SCORED = {"prompt": "수도는?", "responses": ["가", "나", "다", "라"], "scores": [0.3, 0.9, 0.2, 0.5]}


def ready(path: Any, tmp_path: Path, **options: Any) -> PreferenceData:
    return prepared(PreferenceData(path, **({"val_fraction": 0.0} | options)), tmp_path)


def trees(data: PreferenceData) -> list[Tree]:
    assert data.train_trees is not None
    return [data.train_trees[i] for i in range(len(data.train_trees))]


def texts(data: PreferenceData) -> list[list[str]]:
    decode = data.template.tokenizer.decode
    return [[str(decode(r, skip_special_tokens=True)) for r in tree.responses] for tree in trees(data)]


# what is compared with what


def test_pairs_become_trees_best_first(tmp_path: Path) -> None:
    data = ready(write(tmp_path / "a.jsonl", PAIRS), tmp_path)
    assert texts(data) == [[row["chosen"], row["rejected"]] for row in PAIRS]
    tree = trees(data)[3]
    assert tree.prompt == data.template.prompt([{"role": "user", "content": PAIRS[3]["prompt"]}])
    assert all(response[-1] in data.template.stop for response in tree.responses)
    assert tree.weights == [[1.0] * len(response) for response in tree.responses] and tree.scores is None
    batch = next(iter(data.train_dataloader()))
    assert batch.totals.prompts == 20 and batch.totals.responses == 40 and batch.score.tolist() == [0.0] * 40


@pytest.mark.parametrize(
    ("order", "expected"),
    [("lower_is_better", ["제주", "서울", "부산"]), ("higher_is_better", ["부산", "서울", "제주"])],
)
def test_rankings_are_read_as_asked(tmp_path: Path, order: str, expected: list[str]) -> None:
    """A JSON array in a file named .jsonl, as KoChatGPT has it."""
    path = tmp_path / "kochatgpt_2_RM.jsonl"
    path.write_text(json.dumps([KO, KO | {"ranking": [1, 0, 2]}], ensure_ascii=False), encoding="utf-8")
    data = ready(str(path), tmp_path, rank_order=order)
    assert texts(data)[0] == expected and trees(data)[0].scores is None
    assert texts(data)[1] == (["서울", "부산", "제주"] if order.startswith("lower") else ["제주", "부산", "서울"])


@pytest.mark.parametrize("kind", [PreferenceData, InstructionData])
def test_a_ranking_is_never_guessed(tmp_path: Path, kind: Any) -> None:
    path = write(tmp_path / "a.jsonl", [KO])
    for on_error in ("raise", "skip"):  # it is not a fault of rows, to be skipped one by one
        with pytest.raises(UserError, match=r"a\.jsonl: .*--data\.rank_order lower_is_better .*--rank-order"):
            prepared(kind(path, on_error=on_error), tmp_path)
    data = prepared(kind(path, rank_order="lower_is_better", val_fraction=0.0), tmp_path)
    assert data.train_trees is not None and data.train_trees[0].responses


def test_scores_are_labels_of_the_batch(tmp_path: Path) -> None:
    pair = PAIRS[0]
    rows = [SCORED, pair | {"margin": 2}, pair | {"score_chosen": 8, "score_rejected": 7.5}, pair]
    data = ready(write(tmp_path / "a.jsonl", rows[:1]), tmp_path)
    assert texts(data) == [["나", "라", "가", "다"]] and trees(data)[0].scores == pytest.approx([0.9, 0.5, 0.3, 0.2])
    data = ready(write(tmp_path / "b.jsonl", rows[1:]), tmp_path)
    assert [tree.scores for tree in trees(data)] == [[2.0, 0.0], [8.0, 7.5], None]
    batch = next(iter(data.train_dataloader()))
    margins = {
        int(row): (batch.score[batch.group == i][0] - batch.score[batch.group == i][1]).item()
        for i, row in enumerate(batch.row)
    }
    assert margins == {0: 2.0, 1: 0.5, 2: 0.0}


@pytest.mark.parametrize(
    ("scores", "gap", "kept"),
    [
        ([0.9, 0.5, 0.3, 0.2], 0.0, [0, 1, 2, 3]),
        ([0.9, 0.5, 0.3, 0.2], 0.1, [0, 1, 2, 3]),  # 0.3 - 0.2 is 0.09999999999999998
        ([0.9, 0.5, 0.3, 0.2], 0.2, [0, 1, 2]),
        ([0.9, 0.5, 0.3, 0.2], 0.3, [0, 1, 3]),  # 0.2 is 0.3 below 0.5, the last one kept
        ([0.9, 0.5, 0.3, 0.2], 0.7, [0, 3]),
        ([0.9, 0.5, 0.3, 0.2], 0.8, [0]),
        ([3, 3, 1], 0.0, [0, 1, 2]),  # ties are no business of a gap of 0
        ([3, 3, 1], 0.5, [0, 2]),
    ],
)
def test_no_pair_is_closer_than_the_gap(scores: list[float], gap: float, kept: list[int]) -> None:
    assert above_gap(scores, gap) == kept


@pytest.mark.parametrize(
    ("count", "most", "kept"),
    [
        (4, None, [0, 1, 2, 3]),
        (4, 9, [0, 1, 2, 3]),
        (9, 2, [0, 8]),
        (9, 3, [0, 4, 8]),
        (9, 5, [0, 2, 4, 6, 8]),
        (4, 3, [0, 2, 3]),
        (5, 4, [0, 1, 3, 4]),
    ],
)
def test_best_and_worst_are_always_compared(count: int, most: int | None, kept: list[int]) -> None:
    assert spread(count, most) == kept


def test_options_choose_responses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [SCORED, SCORED | {"scores": [1, 1, 1, 0]}, SCORED | {"scores": [0.1, 0.2, 0.15, 0.2]}]
    path = write(tmp_path / "a.jsonl", rows)
    chosen = {
        "nothing": ({}, [["나", "라", "가", "다"], ["가", "라"], ["나", "다", "가"]]),
        "gap": ({"min_gap": 0.3}, [["나", "라", "다"], ["가", "라"]]),
        "most": ({"max_responses": 2}, [["나", "다"], ["가", "라"], ["나", "가"]]),
        "both": ({"min_gap": 0.3, "max_responses": 2}, [["나", "다"], ["가", "라"]]),
    }
    for options, expected in chosen.values():
        data = ready(path, tmp_path, **options)
        assert texts(data) == expected
        assert [len(tree.scores or ()) for tree in trees(data)] == [len(row) for row in expected]
    with caplog.at_level("INFO", "leyden"):
        ready(path, tmp_path, min_gap=0.3, max_responses=2)
    assert "scored, 2 rows kept, dropped: 1 closer than min_gap, 4 responses not compared" in caplog.text


def test_a_gap_needs_scores(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [PAIRS[0] | {"margin": 1}, PAIRS[1]])
    with pytest.raises(UserError, match=r"a\.jsonl:2: no scores to see a gap of 0\.5 in; leave out --data\.min_gap"):
        ready(path, tmp_path, min_gap=0.5)
    assert len(trees(ready(path, tmp_path, min_gap=0.5, on_error="skip"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_gap": -1.0}, "min_gap -1"),
        ({"min_gap": float("nan")}, "min_gap nan"),
        ({"max_responses": 1}, "max_responses 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PreferenceData("a.jsonl", **options)


def test_order_by_hand() -> None:
    def said(*texts: str) -> list[Any]:
        return [[{"role": "assistant", "content": text}] for text in texts]

    assert best_first(said("a", "b")) == [0, 1]
    assert best_first(said("a", "b", "c"), [1, 3, 2]) == [1, 2, 0]
    assert best_first(said("a", "b", "c", "d"), [2, 1, 2, 1]) == [0, 1]
    assert without_repeats("aabbc") == [0, 2, 4]
    for words, worth, reason in (
        ("a", None, "only one response"),
        ("aa", None, "chosen equals rejected"),
        ("ab", [1, 1], "tied"),
        ("aaa", [3, 2, 1], "all responses are equal"),
        ("aba", [3, 2, 1], "contradicts itself"),
    ):
        with pytest.raises(RowError) as caught:
            best_first(said(*words), worth)
        assert caught.value.reason == reason


# what is left out, and why

BAD = {
    "chosen equals rejected": {"prompt": "?", "chosen": "네", "rejected": " 네\n"},
    "empty response": {"prompt": "?", "chosen": "네", "rejected": ""},
    "empty response ": {"prompt": "?", "chosen": " \n", "rejected": "네"},
    "empty prompt": {"prompt": "", "chosen": "네", "rejected": "아니요"},
    "tied": {"prompt": "?", "chosen": "네", "rejected": "응", "score_chosen": 1, "score_rejected": 1},
    "negative margin": {"prompt": "?", "chosen": "네", "rejected": "응", "margin": -0.5},
    "no rejected": {"prompt": "?", "chosen": "네"},
}


def test_bad_rows_are_counted_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", [*PAIRS, *BAD.values()])
    with open(path, "a", encoding="utf-8") as file:
        file.write("{oops\n")
    with pytest.raises(UserError, match=r"a\.jsonl:\d+: .* \(7 more rows are bad\); .*--data\.on_error skip"):
        ready(path, tmp_path)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level("INFO", "leyden"):
            assert len(trees(ready(path, tmp_path, on_error="skip"))) == 20
        assert (
            "20 rows kept, dropped: 2 empty response, 1 chosen equals rejected, 1 empty prompt, 1 negative margin, "
            "1 no rejected, 1 tied, 1 unreadable" in caplog.text
        )
        listed = (tmp_path / "run" / "a.rejected.jsonl").read_text(encoding="utf-8").splitlines()
        assert sorted(int(json.loads(line)["source"].rpartition(":")[2]) for line in listed) == list(range(21, 29))


def test_rejected_rows_of_a_compressed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(Path(write(tmp_path / "b.jsonl", [PAIRS[0], BAD["tied"]])).read_bytes()))
    assert len(trees(ready(str(path), tmp_path, on_error="skip"))) == 1
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["a.rejected.jsonl"]


TRANSCRIPT = "\n\nHuman: 안녕?\n\nAssistant: {}"


@pytest.mark.parametrize(
    ("chosen", "rejected", "problem", "reason"),
    [
        ("네.", "", "'rejected, turn 2' is empty", "empty response"),
        ("네.", "네.  ", "chosen equals rejected", "chosen equals rejected"),
        ("네.", "네.\n\nHuman: 왜?\n\nAssistant: 음.", "'chosen' ends where the other goes on", "different prompts"),
        (
            "네.\n\nHuman: 어?\n\nAssistant: 음.",
            "네.\n\nHuman: 왜?\n\nAssistant: 음.",
            "differ in turn 3, a user turn",
            "different prompts",
        ),
        ("네.\n\nAssistant: 어.", "음.", "turn 3 is assistant after assistant", "turns out of order"),
    ],
)
def test_transcripts_that_do_not_fit(tmp_path: Path, chosen: str, rejected: str, problem: str, reason: str) -> None:
    good = {"chosen": TRANSCRIPT.format("가."), "rejected": TRANSCRIPT.format("나.")}
    bad = {"chosen": TRANSCRIPT.format(chosen), "rejected": TRANSCRIPT.format(rejected)}
    path = write(tmp_path / "hh.jsonl", [good, bad])
    with pytest.raises(UserError, match=rf"hh\.jsonl:2: .*{problem}"):
        ready(path, tmp_path)
    data = ready(path, tmp_path, on_error="skip")
    assert texts(data) == [["가.", "나."]] and data._stores[0].report.dropped == {reason: 1}


def test_a_prompt_column_that_asks_something_else(tmp_path: Path) -> None:
    row = {"prompt": "다른 질문?", "chosen": TRANSCRIPT.format("가"), "rejected": TRANSCRIPT.format("나")}
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=r"a\.jsonl:1: 'prompt' is not what .* --data\.format chosen-rejected"):
        ready(path, tmp_path)
    assert texts(ready(path, tmp_path, format="chosen-rejected")) == [["가", "나"]]


def test_responses_that_the_template_rewrites(tmp_path: Path) -> None:
    lower = "{% for m in messages %}{{ m.content | lower }}{{ eos_token }}{% endfor %}"
    path = write(tmp_path / "a.jsonl", [{"prompt": "?", "chosen": "Yes", "rejected": "yes"}, PAIRS[0]])
    with pytest.raises(UserError, match=r"a\.jsonl:1: the chat template leaves out or rewrites turn 2 .*'Yes'"):
        ready(path, tmp_path, chat_template=lower)
    assert len(trees(ready(path, tmp_path, chat_template=lower, on_error="skip"))) == 1


# rows that are too long

LONG = Tree(
    [9, 1, 2, 3], [[5, 6, 7, 8], [5, 6], [5, 6, 7]], [3.0, 2.0, 1.0], [[0.0, 1.0, 1.0, 1.0], [1.0] * 2, [1.0] * 3]
)


def test_cut_prompts_stay_one_prompt() -> None:
    cut = fit(LONG, 7, "truncate_prompt")
    assert cut.prompt == [9, 2, 3] and cut.responses == LONG.responses and cut.scores == LONG.scores
    assert fit(LONG, 8, "truncate_prompt") is LONG
    with pytest.raises(RowError, match="the response alone takes 5 tokens"):
        fit(LONG, 5, "truncate_prompt")


def test_cut_responses_stay_different() -> None:
    with pytest.raises(LeftOut, match="equal when cut"):  # the first and the third become equal, around the second
        fit(LONG, 7, "truncate_response")
    beside = Tree(LONG.prompt, [[5, 6, 7, 8], [5, 6, 7], [5, 6]], [3.0, 2.0, 1.0])
    cut = fit(beside, 7, "truncate_response")
    assert (cut.responses, cut.scores) == ([[5, 6, 7], [5, 6]], [3.0, 1.0])
    assert cut.weights == [[1.0] * 3, [1.0] * 2]
    two = Tree(LONG.prompt, [[5, 6, 7, 8], [5, 9]], [2.0, 1.0], None, 4)
    cut = fit(two, 7, "truncate_response")
    assert (cut.responses, cut.scores, cut.row) == ([[5, 6, 7], [5, 9]], [2.0, 1.0], 4)
    assert fit(two, 6, "truncate_response").responses == [[5, 6], [5, 9]]
    with pytest.raises(LeftOut, match="equal when cut"):
        fit(two, 5, "truncate_response")
    with pytest.raises(RowError, match="the prompt alone takes 4 tokens, 4 fit; .*truncate_prompt or drop"):
        fit(two, 4, "truncate_response")


def test_long_rows_follow_the_option(tmp_path: Path) -> None:
    story = "옛날에 토끼가 살았다. " * 30
    rows = [
        PAIRS[0],
        {"prompt": "?", "chosen": story + "끝.", "rejected": story + "끝!"},
        {"prompt": story, "chosen": "네", "rejected": "응"},
        {"prompt": "?", "chosen": "네", "rejected": story},
    ]
    path = write(tmp_path / "a.jsonl", rows)

    def outcome(**options: Any) -> tuple[list[int], dict[str, int], int]:
        data = ready(path, tmp_path, max_length=64, on_error="skip", **options)
        report = data._stores[0].report
        return [int(data.source(tree.row).rpartition(":")[2]) for tree in trees(data)], report.dropped, report.truncated

    assert outcome() == ([1], {"too long": 3}, 0)
    assert outcome(overlength="error") == ([1], {"too long": 3}, 0)
    assert outcome(overlength="truncate_prompt") == ([1, 3], {"response too long": 2}, 1)
    assert outcome(overlength="truncate_response") == ([1, 4], {"equal when cut": 1, "prompt too long": 1}, 1)
    with pytest.raises(
        UserError, match=r"a\.jsonl:3: the prompt alone takes \d+ tokens, 64 fit; raise --data\.max_len"
    ):
        ready(path, tmp_path, max_length=64, overlength="truncate_response")
    data = ready(path, tmp_path, max_length=64, overlength="truncate_prompt", on_error="skip")
    assert max(len(tree.prompt) + max(map(len, tree.responses)) for tree in trees(data)) == 64 == data.longest_row


def test_a_row_with_all_its_responses_must_fit(tmp_path: Path) -> None:
    """The length that is limited is that of a path; a tree of K responses holds more tokens."""
    rows = [PAIRS[0], {"prompt": "?", "responses": ["가 " * 9 + str(i) for i in range(8)], "scores": list(range(8))}]
    data = ready(write(tmp_path / "a.jsonl", rows[1:]), tmp_path)
    whole, path = len(trees(data)[0]), data.longest_row
    assert path < whole
    message = rf"a\.jsonl:1: a prompt of \d+ tokens with its 8 responses has {whole} tokens but a micro-batch holds "
    with pytest.raises(UserError, match=message + rf"{whole - 1}; set --data.max_tokens {whole} .*max_responses 2"):
        ready(write(tmp_path / "a.jsonl", rows[1:]), tmp_path, max_tokens=whole - 1)
    assert len(trees(ready(write(tmp_path / "a.jsonl", rows[1:]), tmp_path, max_tokens=whole))) == 1
    with pytest.raises(UserError, match=r"with its 2 responses has \d+ tokens .* or a lower --data.max_length"):
        ready(write(tmp_path / "b.jsonl", rows[:1]), tmp_path, max_tokens=8)


# the cache and the split


def test_the_cache_is_keyed_by_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [SCORED, SCORED | {"prompt": "?"}])
    built: list[Path] = []
    build = module.build
    monkeypatch.setattr(module, "build", lambda to, rows: (built.append(to), build(to, rows)))
    changes: list[dict[str, Any]] = [{}, {}, {"min_gap": 0.3}, {"max_responses": 3}, {"rank_order": "lower_is_better"}]
    for options in [*changes, {"overlength": "truncate_prompt"}, {"max_length": 99}, {"min_gap": 0.3}]:
        ready(path, tmp_path, **options)
    assert len(built) == len(set(built)) == 6
    prepared(InstructionData(path), tmp_path)
    assert len(set(built)) == 7  # the same file, read as another kind


def test_comparisons_of_one_prompt_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"질문 {i % 10}?", "chosen": f"{i}번", "rejected": f"{i}호"} for i in range(40)]
    data = prepared(PreferenceData(write(tmp_path / "a.jsonl", rows), val_fraction=0.3), tmp_path)
    sides = [{tuple(t[i].prompt) for i in range(len(t))} for t in (data.train_trees, data.val_trees) if t is not None]
    assert [len(side) for side in sides] == [7, 3] and not sides[0] & sides[1]
    assert data.val_trees is not None and len(data.val_trees) == 12


# through a Trainer, and responses to score


class Recorder(LightningModule):
    """Keeps what the loaders give."""

    predicts = "scores"

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[Batch] = []
        self.held: list[Batch] = []
        self.chunks: list[Any] = []

    def experience(self, loader: Any) -> Any:
        return loader

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.batches.append(batch)
        return self.weight * batch.prompt_mean(batch.per_prompt(batch.score))

    def validation_step(self, batch: Batch, index: int) -> None:
        self.held.append(batch)

    def predict_step(self, batch: Any, index: int) -> Any:
        self.chunks.append(batch)
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=str(folder), **(quiet | options))


def test_a_trainer_gets_every_pair_once(tmp_path: Path) -> None:
    rows = [row | {"margin": i} for i, row in enumerate(PAIRS)]
    data = PreferenceData(write(tmp_path / "a.jsonl", [*rows, *BAD.values()]), batch_size=8, on_error="skip")
    found = Recorder()
    trainer(tmp_path, accumulate_grad_batches=2, num_sanity_val_steps=0).fit(found, datamodule=data)
    normalised_turns, held = (
        sorted(int(row) for batch in batches for row in batch.row) for batches in (found.batches, found.held)
    )
    assert len(normalised_turns) == 19 and sorted(normalised_turns + held) == list(range(20))
    assert {batch.totals.prompts for batch in found.batches} == {8, 3} and len(found.batches) == 6
    margins = {int(r): float(b.score[b.group == i].sum()) for b in found.batches for i, r in enumerate(b.row)}
    assert margins == {row: float(row) for row in normalised_turns}
    assert (tmp_path / "a.rejected.jsonl").is_file()


CANDIDATES: list[dict[str, Any]] = [
    PAIRS[0],
    {"prompt": "?", "chosen": "같다", "rejected": "같다"},
    {"prompt": PAIRS[0]["prompt"], "chosen": "1", "rejected": "2", "score_chosen": 1, "score_rejected": 1},
]


def test_responses_to_score_keep_the_order_of_the_row(tmp_path: Path) -> None:
    data = PreferenceData(write(tmp_path / "a.jsonl", CANDIDATES), predict_size=2)
    found = Recorder()
    trainer(tmp_path).predict(found, datamodule=data)
    assert [len(chunk) for chunk in found.chunks] == [2, 1]
    pairs = [pair for chunk in found.chunks for pair in chunk]
    decode = data.template.tokenizer.decode
    for row, (example, tree) in zip(CANDIDATES, pairs, strict=True):
        assert [r[0]["content"] for r in example.responses] == [row["chosen"], row["rejected"]]
        assert [decode(r, skip_special_tokens=True) for r in tree.responses] == [row["chosen"], row["rejected"]]
        assert tree.prompt == data.template.prompt(example.messages) and example.row == row


@pytest.mark.parametrize("kind", [PreferenceData, InstructionData])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (KO, ["부산", "서울", "제주"]),
        ({k: v for k, v in KO.items() if k != "ranking"}, ["부산", "서울", "제주"]),
        ({"prompt": "?", "responses": ["나", "가", "나"]}, ["나", "가", "나"]),
        ({"prompt": "?", "response": "나", "finished": True, "row": {"prompt": "?"}}, ["나"]),
        ({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "나"}]}, ["나"]),
        ({"chosen": TRANSCRIPT.format("가"), "rejected": TRANSCRIPT.format("나")}, ["가", "나"]),
    ],
)
def test_any_row_with_answers_can_be_scored(tmp_path: Path, kind: Any, row: Any, expected: list[str]) -> None:
    data = prepared(kind(write(tmp_path / "a.jsonl", [row])), tmp_path, "predict", "scores")
    ((example, tree),) = [pair for chunk in data.predict_dataloader() for pair in chunk]
    assert [data.template.tokenizer.decode(r, skip_special_tokens=True) for r in tree.responses] == expected
    assert [response[-1]["content"] for response in example.responses] == expected


def test_rows_to_score_are_never_lost_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = {"prompt": "?", "chosen": "네", "rejected": "길다 " * 40}

    def scored(rows: list[Any], **options: Any) -> list[Any]:
        data = PreferenceData(write(tmp_path / "a.jsonl", rows), **options)
        return [p for chunk in prepared(data, tmp_path, "predict", "scores").predict_dataloader() for p in chunk]

    for options in ({}, {"overlength": "truncate_response"}, {"on_error": "skip"}):
        with pytest.raises(
            UserError, match=r"a\.jsonl:2: \d+ tokens of prompt and response, 40 fit; set --data\.max_le"
        ):
            scored([PAIRS[0], long], max_length=40, **options)
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: .* 40 fit \(1 more rows are longer too\); set --data\.max_length 1\d\d,"
    ):
        scored([long, long | {"rejected": "길다 " * 50}], max_length=40)
    with pytest.raises(UserError, match=r"a\.jsonl:2: 'rejected' is empty.*--data\.on_error skip"):
        scored([PAIRS[0], BAD["empty response"]])
    with caplog.at_level("INFO", "leyden"):
        assert len(scored([PAIRS[0], BAD["empty response"]], on_error="skip")) == 1
    assert "a.jsonl:2: 'rejected' is empty" in caplog.text


def test_chunks_hold_so_many_tokens_and_every_rank_has_one(tmp_path: Path) -> None:
    rows = [{"prompt": "?", "responses": ["가 " * 5, "나 " * 5]} for _ in range(7)]
    path = write(tmp_path / "a.jsonl", rows)
    data = prepared(PreferenceData(path), tmp_path, "predict", "scores")
    one = len(next(iter(data.predict_dataloader()))[0][1])

    def sizes(**options: Any) -> list[list[int]]:
        world = options.pop("world", 1)
        ranks = []
        for rank in range(world):
            data = PreferenceData(path, **options)
            data = prepared(data, tmp_path, "predict", "scores", global_rank=rank, world_size=world)
            ranks.append([len(chunk) for chunk in data.predict_dataloader()])
        return ranks

    assert sizes() == [[7]] and sizes(max_tokens=2 * one) == [[2, 2, 2, 1]]
    assert sizes(max_tokens=2) == [[1] * 7]  # without gradients a row that is larger goes through by itself
    assert sizes(predict_size=3) == [[3, 3, 1]] and sizes(world=2) == [[4], [3]]
    assert sizes(world=9) == [[1]] * 7 + [[0]] * 2
