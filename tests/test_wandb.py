"""Weights & Biases without an account: the run is kept on disk with the numbers of metrics.csv."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from leyden.wandb import AXES, WandB

CONFIG = [
    "--config",
    "demo",
    "--config",
    "lora",
    "--config",
    "eval",
    "--config",
    "wandb",
    "--data.path",
    "answers.jsonl",
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody has logged in, whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))


def records(folder: Path) -> list[dict[str, Any]]:
    """What an offline run holds, as wandb's own reader says it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No such command" in done.stderr:
        pytest.skip("this version of wandb does not read its own files")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.usefixtures("offline")
def test_an_offline_run_holds_the_numbers_of_metrics_csv(leyden: Run, workplace: Path) -> None:
    leyden("data", "sample", "--language", "ko", "--kind", "instruction", "--rows", "40", "--output", "answers.jsonl")
    more = ["--eval.path", "answers.jsonl", "--eval.reward", "Gold", "--eval.sampling.max_new_tokens", "4",
            "--eval.size", "3", "--trainer.max_steps", "2", "--trainer.default_root_dir", "run"]  # fmt: skip
    code, _, err = leyden("fit", *CONFIG, *more)
    assert code == 0 and "wandb sync run/wandb/offline-run" in err, err
    (folder,) = (workplace / "run" / "wandb").glob("offline-run-*")
    found = records(folder)
    history: dict[int, dict[str, Any]] = {}
    for record in found:
        if record["type"] == "history":
            row = record["history"]["item"]
            history.setdefault(int(row["step"]), {}).update(row)
    with (workplace / "run" / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == sorted(history) == [0, 1, 2]
    for row in rows:
        mine = history[int(row["step"])]
        assert {name: float(mine[name]) for name, value in row.items() if value} == {
            name: float(value) for name, value in row.items() if value
        }
        assert set(AXES) <= set(mine)
    assert "eval/reward" in history[0] and history[0]["train/tokens"] == 0
    text = json.dumps(found)
    for fact in ("SFT", "made_from", "class_path", "adapter-"):  # job type, what it is made from, config, artifact
        assert fact in text, fact


@pytest.mark.usefixtures("offline")
def test_a_second_run_of_a_process_lies_in_its_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A notebook moves to another folder between two runs; W&B's own process does not."""
    for number in range(2):
        here = tmp_path / str(number)
        here.mkdir()
        monkeypatch.chdir(here)
        logger = WandB(mode="offline")
        logger.begin(Path("run"), {}, {"algorithm": "SFT"})
        logger.log_metrics({"train/loss": 1.0 + number}, 0)
        logger.finalize("success")
        (kept,) = (here / "run" / "wandb").glob("offline-run-*")
        rows = [record["history"]["item"] for record in records(kept) if record["type"] == "history"]
        assert [row["train/loss"] for row in rows] == [1.0 + number]


@pytest.mark.usefixtures("offline")
def test_unreachable_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    logger = WandB(mode="online", patience=1.0)
    logger.log_metrics({"val/loss": 2.0}, -1)
    logger.begin(tmp_path, {}, {"algorithm": "SFT"})
    logger.log_metrics({"train/loss": 1.0}, 0)
    assert logger.run is not None and logger.run.settings.mode == "offline"
    logger.finalize("success")
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize(("error", "said"), [(RuntimeError("no space left"), "no space left"), (OSError(), "OSError")])
def test_what_fails_later_is_said_once(error: Exception, said: str, caplog: Any) -> None:
    class Broken:
        def log(self, row: Any) -> None:
            raise error

    logger = WandB()
    logger.run = Broken()
    with caplog.at_level("WARNING", "leyden"):
        for step in range(3):
            logger.log_metrics({"train/loss": 1.0}, step)
    assert [record.getMessage() for record in caplog.records] == [f"W&B: {said}; training goes on without it"]
