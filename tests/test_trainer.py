"""The Trainer for programs does what `leyden fit` does, in a folder of the same kind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from leyden.checkpoint import Checkpoint
from leyden.errors import UserError
from leyden.run import Throughput
from leyden.trainer import Trainer

FIT = "fit --model toy.Toy --model.policy toy.Bigrams --data toy.ToyData --data.path rows.jsonl".split()
QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}


def train(folder: str | None, *, ckpt_path: str | None = None, **options: Any) -> Any:
    """Train the toy anew; returns it."""
    import toy

    seed_everything(0)
    algorithm = toy.Toy(toy.Bigrams(), lr_scheduler=None)  # a schedule would end where a shorter run ends
    Trainer(folder, **(QUIET | options)).fit(algorithm, toy.ToyData("rows.jsonl"), ckpt_path=ckpt_path)
    return algorithm


def losses(folder: str) -> list[str]:
    with Path(folder, "metrics.csv").open(encoding="utf-8") as stream:
        return [row["train/loss"] for row in csv.DictReader(stream) if row["train/loss"]]


def test_it_leaves_what_the_command_line_leaves(leyden, workplace: Path) -> None:
    train("runs/program", max_epochs=2)
    schedule = ["--model.lr_scheduler", "null"]
    code, _, error = leyden(*FIT, *schedule, "--trainer.max_epochs", "2", "--trainer.default_root_dir", "runs/command")
    assert code == 0, error
    program, command = ({p.name for p in Path("runs", name).iterdir()} for name in ("program", "command"))
    assert program == command and {"metrics.csv", "config.yaml", "run.json", "checkpoints", "export"} <= program
    assert losses("runs/program") == losses("runs/command") and len(losses("runs/program")) == 8
    facts = [json.loads(Path("runs", name, "run.json").read_text()) for name in ("program", "command")]
    assert facts[0] == facts[1]


def test_a_resumed_run_is_one_that_never_stopped(workplace: Path) -> None:
    straight = train("runs/straight", max_epochs=2)
    train("runs/stopped", max_epochs=2, max_steps=3)
    resumed = train("runs/stopped", max_epochs=2, ckpt_path="last")
    assert torch.equal(straight.policy.table.weight, resumed.policy.table.weight)
    assert losses("runs/stopped") == losses("runs/straight")


def test_a_folder_with_a_run_is_refused(workplace: Path) -> None:
    train("runs/toy")
    with pytest.raises(UserError, match="already holds a run"):
        train("runs/toy")
    with pytest.raises(UserError, match="no checkpoint"):
        train("runs/other", ckpt_path="last")
    assert not Path("runs/other").exists()


def test_without_a_folder_nothing_is_written(workplace: Path) -> None:
    import toy

    before = sorted(workplace.rglob("*"))
    algorithm = train(None)
    trainer = Trainer(**QUIET)
    trainer.validate(algorithm, toy.ToyData("rows.jsonl"), verbose=False)
    assert float(trainer.callback_metrics["val/loss"]) > 0
    after = [path for path in sorted(workplace.rglob("*")) if "__pycache__" not in path.parts]
    assert after == before


def test_what_is_given_takes_the_place_of_its_kind(workplace: Path) -> None:
    mine = Throughput(window=3)
    trainer = Trainer("runs/toy", callbacks=mine, checkpoint=Checkpoint(every_n_train_steps=1, save_top_k=-1), **QUIET)
    assert [c for c in trainer.callbacks if isinstance(c, Throughput)] == [mine]
    train("runs/many", checkpoint=Checkpoint(every_n_train_steps=1, save_top_k=-1), max_steps=3)
    assert len(list(Path("runs/many/checkpoints").glob("*.ckpt"))) == 3
    train("runs/none", enable_checkpointing=False)
    assert not Path("runs/none/checkpoints").exists() and Path("runs/none/export").is_dir()


def test_an_end_is_one_epoch_unless_another_is_given(workplace: Path) -> None:
    assert Trainer(**QUIET).max_epochs == 1
    assert Trainer(max_steps=3, **QUIET).max_epochs == -1 and Trainer(max_epochs=4, **QUIET).max_epochs == 4


def test_runs_are_seeds_of_one_only_where_their_settings_say_so(workplace: Path) -> None:
    from leyden.compare.groups import grouped
    from leyden.compare.run import read_run

    told = {"model": {"class_path": "toy.Toy", "init_args": {"scale": 2.0}}}
    for name, settings in (("a", None), ("b", None), ("c", told), ("d", told)):
        train(f"runs/{name}", max_steps=1, settings=settings)
    runs = [read_run(Path("runs", name), name) for name in "abcd"]
    assert [[run.name for run in group.runs] for group in grouped(runs)] == [["a"], ["b"], ["c", "d"]]
    assert [run.notes for run in runs] == [[]] * 4 and {run.algorithm for run in runs} == {"Toy"}


def test_callbacks_that_cannot_work_are_refused(workplace: Path) -> None:
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    with pytest.raises(UserError, match="StochasticWeightAveraging"):
        Trainer("runs/toy", callbacks=[StochasticWeightAveraging(0.1)], **QUIET)
