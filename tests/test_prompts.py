"""PromptData: which prompts are answered, what is left out and why, and what each process gets of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from prepared import prepared, write
from torch import Tensor

from leyden.data import PlannedData
from leyden.data.prompts import Prompt, PromptLoader
from leyden.datamodules import PromptData
from leyden.datamodules.commands.main import main
from leyden.errors import UserError
from leyden.policy.policy import Sampling

ROWS: list[dict[str, Any]] = [{"prompt": f"{i} 더하기 {i}는?", "answer": str(2 * i)} for i in range(20)]
STORY = "옛날 옛적에 토끼가 살았다. " * 20


class Asker(LightningModule):
    """An algorithm that only keeps what it is given."""

    predicts = "answers"

    def __init__(self, new: int = 16, answers: bool = False) -> None:
        super().__init__()
        self.needs_answers = answers
        self.sampling = Sampling(max_new_tokens=new)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.loader: PromptLoader | None = None
        self.chunks: list[list[Prompt]] = []

    def experience(self, loader: PromptLoader) -> PromptLoader:
        self.loader = loader
        return loader

    def train_dataloader(self) -> Any:
        return [0]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.weight * 0

    def validation_step(self, batch: list[Prompt], index: int) -> None:
        self.chunks.append(batch)

    test_step = validation_step

    def predict_step(self, batch: Any, index: int) -> Any:
        self.chunks.append(batch)
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def ready(path: Any, tmp_path: Path, new: int = 16, stage: str = "fit", **options: Any) -> PromptData:
    world = {name: options.pop(name) for name in ("world_size", "global_rank", "limit_val_batches") if name in options}
    asker = Asker(new, options.pop("answers", False))
    data = PromptData(path, **({"val_fraction": 0.0} | options))
    return prepared(data, tmp_path, stage, lightning_module=asker, **world)


def asked(prompts: Any) -> list[str]:
    return [prompt.example.messages[-1]["content"] for prompt in prompts]


def held(data: PromptData) -> list[Prompt]:
    return [prompt for chunk in data.val_dataloader() for prompt in chunk]


def lines(data: PromptData) -> list[str]:
    return [report.line() for report in data._reports]


# which prompts there are

PAIR = {"prompt": "수도는?", "chosen": "서울", "rejected": "부산"}
TURNS = [
    {"role": "user", "content": "안녕?"},
    {"role": "assistant", "content": "네."},
    {"role": "user", "content": "뭐 해?"},
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "수도는?"}, ["수도는?"]),
        ({"질문": "수도는?"}, ["수도는?"]),
        (PAIR, ["수도는?"]),
        ({"prompt": "수도는?", "response": "서울"}, ["수도는?"]),
        ({"instruction": "더해라", "input": "1, 2", "output": "3"}, ["더해라\n\n1, 2"]),
        ({"prompt": "?", "responses": ["가", "나"], "scores": None}, ["?"]),
        ({"prompt": "?", "completion_0": "가", "completion_1": "나"}, ["?"]),
        ({"messages": TURNS}, ["안녕?", "네.", "뭐 해?"]),
        ({"messages": [*TURNS, {"role": "assistant", "content": "쉬어."}]}, ["안녕?", "네.", "뭐 해?"]),
        ({"chosen": "\n\nHuman: 왜?\n\nAssistant: 음.", "rejected": "\n\nHuman: 왜?\n\nAssistant: 어."}, ["왜?"]),
    ],
)
def test_any_format_gives_its_prompts(tmp_path: Path, row: dict[str, Any], expected: list[str]) -> None:
    data = ready(write(tmp_path / "a.jsonl", [row]), tmp_path)
    (prompt,) = data.train_dataloader().prompts
    assert [turn["content"] for turn in prompt.example.messages] == expected and prompt.example.row == row
    assert prompt.tokens == data.template.prompt(prompt.example.messages) and not prompt.example.responses
    assert data.source(prompt.row) == prompt.example.source == f"{tmp_path / 'a.jsonl'}:1"


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "수도는?", "response": "서울"}, ["수도는?"], "서울"),
        ({"instruction": "더해라", "input": "1, 2", "output": "3"}, ["더해라\n\n1, 2"], "3"),
        (PAIR, ["수도는?"], "서울"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "쉬어."}]}, ["안녕?", "네.", "뭐 해?"], "쉬어."),
    ],
)
def test_answers_of_rows_come_along_where_they_are_trained_on(
    tmp_path: Path, row: dict[str, Any], prompt: list[str], answer: str
) -> None:
    """After the same prompts as without them: the last turn, with the token that ends it."""
    file = write(tmp_path / "a.jsonl", [row])
    plain = ready(file, tmp_path).train_dataloader().prompts[0]
    data = ready(file, tmp_path, answers=True, val_path=write(tmp_path / "b.jsonl", [{"prompt": "왜?"}]))
    (found,) = data.train_dataloader().prompts
    assert [turn["content"] for turn in found.example.messages] == prompt and found.tokens == plain.tokens
    assert plain.answer is None and found.answer is not None and found.answer[-1] in data.template.stop
    assert data.template.tokenizer.decode(found.answer[:-1]) == answer
    assert asked(held(data)) == ["왜?"]  # what is held out needs no answer


def test_an_answer_is_cut_where_a_sample_would_be(tmp_path: Path) -> None:
    data = ready(write(tmp_path / "a.jsonl", [{"prompt": "?", "response": STORY}]), tmp_path, 16, answers=True)
    (prompt,) = data.train_dataloader().prompts
    whole = data.template.encode(prompt.example).responses[0]
    assert len(whole) > 16 and prompt.answer == whole[:16] and "1 truncated" in lines(data)[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "?", "response": "!"}, {"prompt": "?", "response": ""}], "a.jsonl:2"),
        ([{"prompt": "?"}], "a.jsonl"),
        ([{"text": "옛날 옛적에"}], "a.jsonl:1: plain text has no prompt"),
    ],
)
def test_rows_without_the_answer_that_is_trained_on_are_named(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(write(tmp_path / "a.jsonl", rows), tmp_path, answers=True)


def test_the_loader_has_what_was_asked_for(tmp_path: Path) -> None:
    loader = ready(write(tmp_path / "a.jsonl", ROWS), tmp_path, batch_size=8, seed=3).train_dataloader()
    assert isinstance(loader, PromptLoader) and (loader.size, loader.seed, len(loader)) == (8, 3, 3)
    assert asked(loader.prompts) == [row["prompt"] for row in ROWS]
    assert [prompt.row for prompt in loader.prompts] == list(range(20))
    few = ready(write(tmp_path / "b.jsonl", ROWS[:3]), tmp_path, batch_size=8).train_dataloader()
    times = Counter(prompt.row for _, prompt in few.draw(0))  # a rollout larger than the file
    assert sorted(times.values()) == [2, 3, 3] and set(times) == {0, 1, 2}


def test_two_formats_come_as_often_as_they_weigh(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").write_text("질문,답변\n" + "".join(f"질문 {i},답\n" for i in range(8)), encoding="utf-8")
    data = ready({a: 0.5, str(tmp_path / "b.csv"): 2}, tmp_path)
    prompts = asked(data.train_dataloader().prompts)
    assert sorted(p for p in prompts if p.startswith("질문")) == sorted([f"질문 {i}" for i in range(8)] * 2)
    assert len(prompts) == 26 and len(set(prompts)) == 18
    places = {data.source(prompt.row) for prompt in data.train_dataloader().prompts}
    assert f"{tmp_path / 'b.csv'}:9" in places and len(places) == 18


def test_rewards_see_the_row_behind_a_sampled_answer(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "?"}]
    row = {"prompt": turns, "response": "4", "finished": True, "row": {"prompt": "?", "answer": "4"}}
    (prompt,) = ready(write(tmp_path / "a.jsonl", [row]), tmp_path).train_dataloader().prompts
    assert prompt.example.row == row["row"]


def test_system_prompt_and_template_are_in_the_tokens(tmp_path: Path) -> None:
    data = ready(write(tmp_path / "a.jsonl", ROWS[:1]), tmp_path, system_prompt="간단히.", chat_template="plain")
    text = data.template.tokenizer.decode(data.train_dataloader().prompts[0].tokens, skip_special_tokens=True)
    assert text == "System:\n간단히.\n\nUser:\n0 더하기 0는?\n\nAssistant:\n" and data.chat_template


# what is left out


def test_bad_rows_stop_the_run_or_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": " "}, {"question": 3}])
    with open(path, "a", encoding="utf-8") as file:
        file.write("{oops\n")
    with pytest.raises(UserError, match=r"a\.jsonl:\d+: .* \(2 more rows are bad\); .*--data\.on_error skip"):
        ready(path, tmp_path)
    with caplog.at_level("INFO", "leyden"):
        data = ready(path, tmp_path, on_error="skip")
    assert len(data.train_dataloader().prompts) == 20
    assert "20 rows kept, dropped: 1 empty prompt, 1 not a text, 1 unreadable" in caplog.text
    listed = (tmp_path / "run" / "a.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["source"].rpartition(":")[2] for line in listed) == ["21", "22", "23"]


def test_prompts_without_room_follow_the_option(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS[:3], {"prompt": STORY}])
    data = ready(path, tmp_path, max_length=64, new=32)
    assert asked(data.train_dataloader().prompts) == [row["prompt"] for row in ROWS[:3]]
    assert "3 rows kept, dropped: 1 no room to answer" in lines(data)[0]
    cut = ready(path, tmp_path, max_length=64, new=32, overlength="truncate_prompt")
    *_, last = cut.train_dataloader().prompts
    whole = cut.template.prompt(last.example.messages)
    assert last.tokens == [whole[0], *whole[-31:]] and "4 rows kept, dropped: none, 1 truncated" in lines(cut)[0]
    assert cut.longest_row == 64 and data.longest_row < 64
    with pytest.raises(
        UserError, match=r"a\.jsonl:4: a prompt of \d+ tokens leaves no room to answer, 32 would \(--data\.max_length"
    ):
        ready(path, tmp_path, max_length=64, new=32, overlength="error")
    skipped = ready(path, tmp_path, max_length=64, new=32, overlength="error", on_error="skip")
    assert len(skipped.train_dataloader().prompts) == 3 and (tmp_path / "run" / "a.rejected.jsonl").is_file()


def test_the_room_is_exact(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    length = len(ready(path, tmp_path).train_dataloader().prompts[0].tokens)
    assert len(ready(path, tmp_path, max_length=length + 5, new=5).train_dataloader().prompts) == 1
    assert ready(path, tmp_path, max_length=length + 5, new=5).longest_row == length + 5
    with pytest.raises(UserError, match="no training prompts are left; look at the counts above"):
        ready(path, tmp_path, max_length=length + 5, new=6)


@pytest.mark.parametrize("new", [64, 65])
def test_an_answer_that_takes_all_the_room(tmp_path: Path, new: int) -> None:
    match = rf"--model\.sampling\.max_new_tokens {new} leaves nothing of --data\.max_length 64 for a prompt"
    with pytest.raises(UserError, match=match):
        ready(write(tmp_path / "a.jsonl", ROWS), tmp_path, max_length=64, new=new)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"overlength": "truncate_response"},
            "--data.overlength truncate_response: prompts take drop, truncate_prompt or",
        ),
        ({"val_size": 0}, "--data.val_size 0: give 1 or more, or --data.val_fraction 0"),
        ({"batch_size": 0}, "--data.batch_size 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptData("a.jsonl", **options)


def test_a_prompt_is_kept_once(tmp_path: Path) -> None:
    a = write(
        tmp_path / "a.jsonl",
        [*ROWS, ROWS[3] | {"answer": "other"}, {"prompt": [{"role": "user", "content": ROWS[5]["prompt"]}]}],
    )
    b = write(tmp_path / "b.jsonl", [ROWS[0], {"prompt": "새 질문?"}])
    data = ready([a, b], tmp_path)
    prompts = data.train_dataloader().prompts
    assert len(prompts) == len({tuple(prompt.tokens) for prompt in prompts}) == 21
    assert prompts[3].example.row["answer"] == "6"  # the first row counts
    assert "20 rows kept, dropped: 2 the same as an earlier prompt" in lines(data)[0]
    assert "1 rows kept, dropped: 1 the same as an earlier prompt" in lines(data)[1]
    assert data.source(prompts[-1].row) == f"{b}:2"


# what is held out


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS * 3)
    data = ready(path, tmp_path, val_fraction=0.25)
    train, val = asked(data.train_dataloader().prompts), asked(held(data))
    assert (len(train), len(val)) == (15, 5) and not set(train) & set(val)
    assert asked(held(ready(path, tmp_path, val_fraction=0.25))) == val
    assert (
        asked(held(ready(path, tmp_path, val_fraction=0.25, seed=1))) == val
    )  # seeds are compared on the same prompts
    beside = write(tmp_path / "b.jsonl", [*ROWS[:4], {"prompt": "새 질문?"}, ROWS[0]])
    data = ready(path, tmp_path, val_path=beside)
    assert asked(held(data)) == [*(row["prompt"] for row in ROWS[:4]), "새 질문?"]
    assert asked(data.train_dataloader().prompts) == [row["prompt"] for row in ROWS[4:]]
    assert "16 rows kept, dropped: 32 the same as an earlier prompt, 12 held out elsewhere" in lines(data)[0]
    assert "5 rows kept, dropped: 1 the same as an earlier prompt" in lines(data)[1]


def test_prompts_to_test_on_are_held_out_too(tmp_path: Path) -> None:
    paths = {"path": write(tmp_path / "a.jsonl", ROWS), "test_path": write(tmp_path / "b.jsonl", ROWS[:7])}
    data, found = PromptData(**paths, val_fraction=0.0), Asker()
    trainer(tmp_path).test(found, datamodule=data, verbose=False)
    assert sorted(asked(p for chunk in found.chunks for p in chunk)) == sorted(row["prompt"] for row in ROWS[:7])
    assert len(data._train) == 13
    with pytest.raises(UserError, match=r"--data\.test_path FILE"):
        trainer(tmp_path).test(Asker(), datamodule=PromptData(paths["path"]))


def test_a_validation_answers_so_many_prompts(tmp_path: Path) -> None:
    path, beside = write(tmp_path / "a.jsonl", ROWS[:1]), write(tmp_path / "b.jsonl", ROWS[1:])

    def sizes(**options: Any) -> list[int]:
        return [len(chunk) for chunk in ready(path, tmp_path, val_path=beside, **options).val_dataloader()]

    assert sizes() == [19] and sizes(predict_size=8) == [8, 8, 3]
    assert sizes(val_size=5) == [5] and sizes(val_size=5, limit_val_batches=0.5) == [2]
    assert sizes(batch_size=4, limit_val_batches=2) == [8] and sizes(limit_val_batches=0) == []
    assert sizes(limit_val_batches=0.001) == [1]
    draws = [asked(held(ready(path, tmp_path, val_path=beside, val_size=5, seed=seed))) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] == draws[2] and len(set(draws[0])) == 5
    data = ready(path, tmp_path, val_path=beside, limit_val_batches=0.5)
    assert len(held(data)) == 9 and data.trainer is not None and data.trainer.limit_val_batches == 1.0
    longest = max(len(prompt.tokens) for prompt in held(ready(path, tmp_path, val_path=beside)))
    assert max(sizes(max_tokens=3 * (longest + 16))) == 3  # side by side, with their answers
    assert sizes(max_tokens=2) == [1] * 19


def test_every_process_gets_its_share(tmp_path: Path) -> None:
    path, beside = (
        write(tmp_path / "a.jsonl", ROWS),
        write(tmp_path / "b.jsonl", [{"prompt": f"{i}?"} for i in range(7)]),
    )

    def shares(world: int, **options: Any) -> list[list[list[str]]]:
        datas = [
            ready(path, tmp_path, val_path=beside, world_size=world, global_rank=rank, **options)
            for rank in range(world)
        ]
        assert len({tuple(asked(data.train_dataloader().prompts)) for data in datas}) == 1  # the loader is global
        return [[asked(chunk) for chunk in data.val_dataloader()] for data in datas]

    assert [len(chunk) for rank in shares(2) for chunk in rank] == [4, 3]
    three = shares(3, predict_size=2)
    assert [[len(chunk) for chunk in rank] for rank in three] == [[2, 1], [2, 0], [2, 0]]  # as many for each
    assert sorted(p for rank in three for chunk in rank for p in chunk) == [f"{i}?" for i in range(7)]
    assert [[len(chunk) for chunk in rank] for rank in shares(9)] == [[1]] * 7 + [[0]] * 2
    with pytest.raises(UserError, match=r"4 processes share a rollout of 3 prompts.*--data\.batch_size 4"):
        ready(path, tmp_path, world_size=4, batch_size=3)


# through a Trainer and the command line


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=str(folder), **(quiet | options))


def test_a_trainer_validates_on_chunks_of_prompts(tmp_path: Path) -> None:
    found = Asker()
    data = PromptData(write(tmp_path / "a.jsonl", ROWS), val_fraction=0.5, predict_size=4)
    trainer(tmp_path).validate(found, datamodule=data, verbose=False)
    assert [len(chunk) for chunk in found.chunks] == [4, 4, 2]
    assert all(isinstance(prompt, Prompt) for chunk in found.chunks for prompt in chunk)


def test_prediction_goes_on_working(tmp_path: Path) -> None:
    found, data = Asker(), PromptData(write(tmp_path / "a.jsonl", [*ROWS, ROWS[0]]), predict_size=8)
    trainer(tmp_path).predict(found, datamodule=data)
    pairs = [pair for chunk in found.chunks for pair in chunk]
    assert [example.row for example, _ in pairs] == [*ROWS, ROWS[0]]  # every row is answered, also the same twice
    assert [tokens for _, tokens in pairs] == [data.template.prompt(example.messages) for example, _ in pairs]
    assert data.longest_row == 0


def test_an_algorithm_that_samples_nothing_is_told_so(tmp_path: Path, leyden: Any) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    flags = ["--data", "PromptData", "--data.path", path, "--trainer.accelerator", "cpu"]
    code, _, err = leyden("fit", "--model", "SFT", "--model.policy.path", "tiny", *flags)
    assert code == 2 and "error: SFT learns from answers that rows have, and PromptData gives prompts alone" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.val_siez", "5"], "--data.val_siez: PromptData has no key 'val_siez'; did you mean 'val_size'?"),
        (["--data.min_gap", "1"], "--data.min_gap: PromptData has no key 'min_gap'"),
        (["--data.overlength", "truncate_response"], "--data.overlength: expected one of 'drop'"),
        (["--data.batch_size", "0"], "--data.batch_size 0"),
    ],
)
def test_keys_are_vetted(flags: list[str], message: str, tmp_path: Path, leyden: Any) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    known = ["--model", "SFT", "--model.policy.path", "tiny", "--data", "PromptData", "--data.path", path]
    code, _, err = leyden("fit", *known, "--data.val_size", "3", *flags)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_prompts_are_not_planned_ahead() -> None:
    """How many steps a rollout takes is the algorithm's to say, so nothing here can be asked for it."""
    assert not issubclass(PromptData, PlannedData) and not hasattr(PromptData, "steps_per_epoch")


# the data commands


def test_check_counts_prompts_without_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS[:3], ROWS[0], {"prompt": STORY}, {"prompt": ""}])
    flags = ["check", path, "--kind", "prompts", "--max-length", "64", "--max-new-tokens", "32"]
    assert main(flags) == 1
    said = capsys.readouterr().out
    assert "prompts data as prompt (prompt)\n" in said and "bad 1 (1 empty prompt)" in said
    assert f"1 rows: the same as an earlier row; training keeps a prompt once ({path}:4 = 1)" in said
    assert "longer than 32 tokens: 1 rows; they follow --data.overlength (drop, truncate_prompt or error)" in said
    assert "response" not in said and "both" not in said
    with pytest.raises(UserError, match="--max-new-tokens 64: the answer's part of --max-length"):
        main([*flags[:-1], "64"])
    with pytest.raises(UserError, match="these are instruction data; --kind prompts"):
        main(["check", path, "--kind", "instruction", *flags[4:]])


def test_show_and_convert_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, back = tmp_path / "p.csv", tmp_path / "back.jsonl"
    assert main(["sample", "--kind", "prompts", "--rows", "5", "--output", str(table)]) == 0
    assert main(["convert", str(table), str(back), "--kind", "prompts"]) == 0
    rows = [json.loads(line) for line in back.read_text(encoding="utf-8").splitlines()]
    assert [list(row) for row in rows] == [["prompt", "language", "topic", "answer", "rivals"]] * 5
    capsys.readouterr()
    assert main(["show", str(back), "--kind", "prompts", "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert rows[0]["prompt"] in said and "⟦" not in said.partition("\n\n")[2]
    data = ready(str(back), tmp_path)
    assert [prompt.example.row for prompt in data.train_dataloader().prompts] == rows
