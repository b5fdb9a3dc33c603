"""Runs: their folder, what they leave behind, and how they stop and go on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from leyden.atomic import write_whole
from leyden.checkpoint.find import AtomicCheckpointIO, find_checkpoint
from leyden.errors import UserError
from leyden.rng import rng_states, set_rng_states
from leyden.run.folder import claim_folder, differences
from leyden.run.metrics_csv import MetricsCSV
from leyden.run.predictions import PredictionWriter
from leyden.run.progress import summarise, total_steps

FIT = "fit --model toy.Toy --model.policy toy.Bigrams --data toy.ToyData --data.path rows.jsonl".split()


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_run_leaves_config_metrics_checkpoint_and_export(leyden, workplace: Path) -> None:
    code, out, err = leyden(*FIT, "--trainer.max_steps", "6", "--model.optimizer.lr", "0.01")
    assert code == 0, err
    run = workplace / "runs" / "toy-1"
    assert out == "exported to runs/toy-1/export\n"
    assert "256 parameters" in err and "step 6/6 · loss" in err and "val/loss" in err
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "export",
        "metrics.csv",
        "run.json",
    ]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step=000006.ckpt"]
    metrics = rows(run / "metrics.csv")
    assert [row["step"] for row in metrics] == list("123456")
    assert metrics[-1]["train/samples"] == "24.0"
    tokens = float(metrics[0]["train/tokens"])
    assert tokens == 20 and float(metrics[0]["perf/tokens_per_second"]) > 0  # 4 rows of 5 tokens
    assert [row["step"] for row in metrics if row["val/loss"]] == ["4", "6"]  # the epoch's end, and the last step
    assert {"train/loss", "train/grad_norm", "train/lr", "train/seconds", "perf/peak_memory_gb"} <= set(metrics[0])
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 6 and config["trainer"]["default_root_dir"] == "runs/toy-1"
    assert "ckpt_path" not in config and "tokenizer" not in config["data"]["init_args"]


def test_the_config_of_a_run_starts_the_same_run_again(leyden, workplace: Path) -> None:
    assert leyden(*FIT, "--trainer.max_steps", "3")[0] == 0
    again = ["fit", "--config", "runs/toy-1/config.yaml", "--trainer.default_root_dir", "again"]
    assert leyden(*again)[0] == 0
    losses = [[row["train/loss"] for row in rows(workplace / run / "metrics.csv")] for run in ("runs/toy-1", "again")]
    assert losses[0] == losses[1]


def test_runs_are_numbered_and_a_folder_is_used_once(leyden, workplace: Path) -> None:
    for _ in range(2):
        assert leyden(*FIT, "--trainer.max_steps", "1")[0] == 0
    assert sorted(path.name for path in (workplace / "runs").iterdir()) == ["toy-1", "toy-2"]
    code, _, err = leyden(*FIT, "--trainer.default_root_dir", "runs/toy-2")
    assert code == 2 and "already holds a run" in err and "--ckpt_path last" in err


def test_epochs_default_to_one_and_steps_alone_bound_a_run(leyden, workplace: Path) -> None:
    assert leyden(*FIT)[0] == 0
    assert rows(workplace / "runs/toy-1/metrics.csv")[-1]["step"] == "4"
    assert leyden(*FIT, "--trainer.max_steps", "9")[0] == 0
    assert rows(workplace / "runs/toy-2/metrics.csv")[-1]["step"] == "9"


def weights(file: Path) -> torch.Tensor:
    return torch.load(file, weights_only=True)["state_dict"]["policy.table.weight"]


@pytest.mark.parametrize("stop", [3, 4, 6])  # in an epoch, at its end, in the second
def test_resuming_equals_never_having_stopped(stop: int, leyden, workplace: Path) -> None:
    every = ["--trainer.max_steps", "8", "--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
    assert leyden(*FIT, *every, "--trainer.default_root_dir", "whole")[0] == 0
    checkpoints = workplace / "part" / "checkpoints"
    checkpoints.mkdir(parents=True)
    name = f"step={stop:06}.ckpt"
    (checkpoints / name).write_bytes((workplace / "whole/checkpoints" / name).read_bytes())
    (workplace / "part/metrics.csv").write_bytes((workplace / "whole/metrics.csv").read_bytes())
    code, _, err = leyden(*FIT, *every, "--trainer.default_root_dir", "part", "--ckpt_path", "last")
    assert code == 0 and f"resuming part at step {stop}" in err
    end = "checkpoints/step=000008.ckpt"
    assert torch.equal(weights(workplace / "whole" / end), weights(workplace / "part" / end))
    kept = [
        [(row["step"], row["train/loss"], row["val/loss"]) for row in rows(workplace / run / "metrics.csv")]
        for run in ("whole", "part")
    ]
    assert kept[0] == kept[1]


STOPPER = """
from lightning.pytorch import Callback

class Stop(Callback):
    def __init__(self, hook: str, step: int) -> None:
        def stop(trainer, *args):
            trainer.should_stop |= trainer.global_step == step and trainer.state.fn == "fit"
        setattr(self, hook, stop)
"""


@pytest.mark.parametrize(
    ("hook", "step"),
    [("on_train_batch_end", 3), ("on_train_batch_end", 4), ("on_validation_end", 4), ("on_train_epoch_end", 4)],
)
def test_a_run_ended_by_a_callback_goes_on_from_its_last_step(hook: str, step: int, leyden, workplace: Path) -> None:
    (workplace / "stopper.py").write_text(STOPPER)
    stop = f"trainer:\n  callbacks:\n  - class_path: stopper.Stop\n    init_args: {{hook: {hook}, step: {step}}}\n"
    (workplace / "stop.yaml").write_text(stop)
    fit = [*FIT, "--trainer.max_epochs", "2", "--trainer.default_root_dir"]
    assert leyden(*fit, "whole")[0] == 0
    assert leyden(*fit, "parts", "--config", "stop.yaml")[0] == 0
    assert [path.name for path in (workplace / "parts/checkpoints").iterdir()] == [f"step={step:06}.ckpt"]
    assert leyden(*fit, "parts", "--ckpt_path", "last")[0] == 0
    whole, parts = (weights(workplace / f"{run}/checkpoints/step=000008.ckpt") for run in ("whole", "parts"))
    assert torch.equal(whole, parts)


def test_a_limit_of_time_saves_the_step_it_ends_at(leyden, workplace: Path) -> None:
    assert leyden(*FIT, "--trainer.max_epochs", "100000", "--trainer.max_time", "00:00:00:01")[0] == 0
    (checkpoint,) = (workplace / "runs/toy-1/checkpoints").iterdir()
    assert checkpoint.name == f"step={int(rows(workplace / 'runs/toy-1/metrics.csv')[-1]['step']):06}.ckpt"


def test_the_configuration_is_the_truth_on_resume(leyden, workplace: Path) -> None:
    assert leyden(*FIT, "--trainer.max_steps", "2", "--model.scale", "1")[0] == 0
    resume = ["--trainer.default_root_dir", "runs/toy-1", "--ckpt_path", "last"]
    code, _, err = leyden(*FIT, "--trainer.max_steps", "3", "--model.scale", "10", *resume)
    assert code == 0
    assert "changed: model.scale: 1.0 -> 10.0" in err and "changed: trainer.max_steps: 2 -> 3" in err
    losses = [float(row["train/loss"]) for row in rows(workplace / "runs/toy-1/metrics.csv")]
    assert losses[2] > 5 * losses[1]
    assert yaml.safe_load((workplace / "runs/toy-1/config.yaml").read_text())["model"]["init_args"]["scale"] == 10


def test_a_checkpoint_that_is_not_there_is_an_error(leyden, workplace: Path) -> None:
    (workplace / "runs/a/checkpoints").mkdir(parents=True)
    (workplace / "runs/a/checkpoints/half.ckpt").write_bytes(b"PK\x03\x04 cut off")
    for args, said in {
        "--ckpt_path last": "of which run?",
        "--ckpt_path last --trainer.default_root_dir runs/b": "no checkpoint in runs/b/checkpoints",
        "--ckpt_path last --trainer.default_root_dir runs/a": "no checkpoint in runs/a/checkpoints",
        "--ckpt_path runs/a/checkpoints/hlaf.ckpt": "did you mean 'runs/a/checkpoints/half.ckpt'",
        "--ckpt_path runs/a/checkpoints/half.ckpt": "not a whole checkpoint",
    }.items():
        code, _, err = leyden(*FIT, *args.split())
        assert code == 2 and said in err and err.count("\n") == 1
    assert not (workplace / "runs/b").exists()


def test_the_newest_whole_checkpoint_is_the_last(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for i, name in enumerate(["step=000900.ckpt", "step=000300.ckpt"]):
        AtomicCheckpointIO().save_checkpoint({"leyden": {"saved": 1000.0 + i}}, folder / name)
        os.utime(folder / name, (1000 - i, 1000 - i))  # the older was copied, or touched, later
    (folder / "step=000999.ckpt").write_bytes((folder / "step=000300.ckpt").read_bytes()[:-40])
    assert find_checkpoint("last", str(tmp_path)) == folder / "step=000300.ckpt"


@pytest.mark.parametrize("place", ["file", "file/below", "file/below/deep"])
def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_built(place: str, leyden, workplace: Path) -> None:
    (workplace / "file").touch()
    args = ["--trainer.default_root_dir", place, "--model.policy.path", "missing"]
    code, _, err = leyden(*FIT, *args)
    assert code == 2 and "not a folder that can be written to" in err and err.count("\n") == 1


@pytest.mark.parametrize("trouble", [["--model.policy.path", "missing"], ["--data.path", "nothing.jsonl"]])
def test_a_run_that_never_started_leaves_nothing(trouble: list[str], leyden, workplace: Path) -> None:
    code, _, err = leyden(*FIT, *trouble)
    assert code == 2 and err.count("\n") == 1
    assert not (workplace / "runs").exists()


def test_a_user_error_in_training_is_one_line(leyden, workplace: Path) -> None:
    code, _, err = leyden(*FIT, "--model.fail_at", "2")
    assert code == 2 and err.endswith("error: toy.csv:7: a broken row; mend it\n")
    assert [row["step"] for row in rows(workplace / "runs/toy-1/metrics.csv")] == ["1", "2"]


def test_validate_shows_and_predict_writes(leyden, workplace: Path) -> None:
    assert leyden(*FIT, "--trainer.max_steps", "2")[0] == 0
    saved = ["--config", "runs/toy-1/config.yaml", "--ckpt_path", "last"]
    code, out, _ = leyden("validate", *saved)
    assert code == 0 and "val/loss" in out
    code, out, err = leyden("predict", *saved)
    assert (code, out) == (0, "runs/toy-1/answers.jsonl: 16 answers\n"), err
    text = (workplace / "runs/toy-1/answers.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line) for line in text.splitlines()]
    assert len(answers) == 16 and "답" in text
    assert answers[0]["response"] == "답 5" and answers[0]["finished"] is True  # the third row's prompt is [3, 2]
    assert leyden("predict", *saved, "--output", "deep/er/a.jsonl")[0] == 0
    assert (workplace / "deep/er/a.jsonl").read_text(encoding="utf-8") == text
    code, _, err = leyden("predict", *saved, "--output", "rows.jsonl/a.jsonl")
    assert code == 2 and "cannot be written" in err


def test_odd_values_in_a_row_do_not_lose_its_answer(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(world_size=1, is_global_zero=True, predicts="answers")
    row = {
        "day": date(2024, 5, 1),
        "price": Decimal("1.5"),
        "raw": b"x",
        "nan": float("nan"),
        "half": "a\ud800",
        1: (2,),
    }
    writer = PredictionWriter(tmp_path / "new" / "a.jsonl")
    writer.setup(trainer, trainer, "predict")
    writer.on_predict_batch_end(trainer, trainer, [{"response": "네", "row": row}])
    writer.on_predict_end(trainer, trainer)
    text = (tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8")
    kept = {"day": "2024-05-01", "price": "1.5", "raw": "b'x'", "nan": None, "half": "a?", "1": [2]}
    assert json.loads(text, parse_constant=pytest.fail) == {"response": "네", "row": kept}


def test_an_output_that_cannot_be_written_is_said_before_anything_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    trainer: Any = SimpleNamespace(world_size=1, is_global_zero=True)
    writer = PredictionWriter(tmp_path / "a.jsonl")
    monkeypatch.setattr("leyden.run.predictions.write_whole", full)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        writer.on_predict_end(trainer, trainer)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        writer.setup(trainer, trainer, "predict")


def test_own_callbacks_and_loggers_take_the_place_of_the_defaults(leyden, workplace: Path) -> None:
    config = "trainer:\n  callbacks:\n  - class_path: Export\n    init_args: {folder: elsewhere}\n"
    (workplace / "own.yaml").write_text(config)
    code, out, _ = leyden(*FIT, "--config", "own.yaml", "--trainer.max_steps", "1", "--trainer.logger", "false")
    assert (code, out) == (0, "exported to elsewhere\n")
    left = sorted(path.name for path in (workplace / "runs/toy-1").iterdir())
    assert left == ["checkpoints", "config.yaml", "run.json"]


def test_ctrl_c_ends_with_130_and_one_line(leyden, workplace: Path) -> None:
    text = (
        (workplace / "toy.py").read_text().replace('raise UserError("toy.csv:7', 'raise KeyboardInterrupt("toy.csv:7')
    )
    (workplace / "stopped_toy.py").write_text(text)
    handler = signal.getsignal(signal.SIGINT)
    try:
        code, _, err = leyden(*FIT, "--model", "stopped_toy.Toy", "--model.fail_at", "2")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert code == 130 and err.splitlines()[-1] == "interrupted"  # nothing is saved yet


def test_sigterm_saves_the_step_and_exits_with_143(workplace: Path) -> None:
    slow = (
        (workplace / "toy.py")
        .read_text()
        .replace("        return self.scale", "        __import__('time').sleep(0.05)\n        return self.scale")
    )
    (workplace / "slow_toy.py").write_text(slow)
    command = [sys.executable, "-m", "leyden", *FIT, "--model", "slow_toy.Toy", "--trainer.max_steps", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        metrics = workplace / "runs/toy-1/metrics.csv"
        deadline = time.monotonic() + 120
        while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    go_on = "leyden fit --config runs/toy-1/config.yaml --ckpt_path last"
    assert out.splitlines()[-1] == f"stopped by SIGTERM; go on with {go_on}"
    (checkpoint,) = (workplace / "runs/toy-1/checkpoints").iterdir()
    assert checkpoint.name == f"step={int(rows(metrics)[-1]['step']):06}.ckpt"


def test_atomic_writes_leave_the_old_file_where_the_new_one_fails(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.ones(2)}, file)
    with pytest.raises(AttributeError):
        AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(2), "bad": lambda: None}, file)
    assert torch.equal(torch.load(file, weights_only=True)["x"], torch.ones(2))
    write_whole(tmp_path / "a.txt", "하나\n")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.txt", "\ud800")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "하나\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "a.txt"]


def test_random_generators_come_back_through_a_checkpoint(tmp_path: Path) -> None:
    import random

    import numpy as np

    AtomicCheckpointIO().save_checkpoint(rng_states(), tmp_path / "r.ckpt")
    drawn = [torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist(), random.gauss(0, 1)]
    set_rng_states(torch.load(tmp_path / "r.ckpt", weights_only=True))
    assert [torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist(), random.gauss(0, 1)] == drawn


def test_metrics_share_rows_grow_columns_and_are_cut(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    for step in range(3):  # Lightning counts finished steps before the one it logs
        log.log_metrics({"a": step}, step)
        log.log_metrics({"b": 10 * step}, step)
    log.log_metrics({"late": 1.5}, 3)
    log.finalize("success")
    assert [list(row.values()) for row in rows(tmp_path / "metrics.csv")] == [
        ["1", "0", "0", ""],
        ["2", "1", "10", ""],
        ["3", "2", "20", ""],
        ["4", "", "", "1.5"],
    ]
    resumed = MetricsCSV(tmp_path)
    resumed.truncate(2)
    resumed.log_metrics({"late": 7}, 1)  # validation of the step at which the checkpoint was taken
    resumed.log_metrics({"a": 5}, 2)
    resumed.finalize("success")
    kept = [list(row.values()) for row in rows(tmp_path / "metrics.csv")]
    assert kept == [["1", "0", "0", ""], ["2", "1", "10", "7"], ["3", "5", "", ""]]


def test_only_the_first_process_claims_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEYDEN_RUN", raising=False)
    first = claim_folder(None, "sft", resume=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert claim_folder(None, "sft", resume=False).folder == first.folder == Path("runs/sft-1")
    monkeypatch.delenv("LOCAL_RANK")
    (first.folder / "config.yaml").touch()
    with pytest.raises(UserError, match="already holds a run"):
        claim_folder("runs/sft-1", "sft", resume=False)
    assert claim_folder("runs/sft-1", "sft", resume=True).folder == first.folder
    assert claim_folder(None, "sft", resume=False).folder == Path("runs/sft-2")


def test_the_summary_counts_quantised_weights_unpacked() -> None:
    module = torch.nn.Linear(10, 10, bias=False).requires_grad_(False)
    module.packed = torch.nn.Parameter(torch.zeros(50, 1, dtype=torch.uint8), requires_grad=False)
    module.packed.quant_state = SimpleNamespace(shape=torch.Size([10, 10]))
    module.adapter = torch.nn.Parameter(torch.zeros(50))
    assert summarise(module) == "250 parameters (0.0 MB), 50 trained (20 %)"


@pytest.mark.parametrize(
    ("limits", "total"),
    [((-1, 3, 10, 4), 9), ((5, 3, 10, 4), 5), ((50, 3, 10, 4), 9), ((7, -1, 10, 1), 7), ((-1, -1, 10, 1), None)],
)
def test_the_bar_knows_when_training_ends(limits: tuple[int, int, int, int], total: int | None) -> None:
    steps, epochs, batches, accumulate = limits  # three epochs of ten batches, by fours: 3 x ceil(10 / 4) steps
    at_start = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)))
    trainer = SimpleNamespace(
        max_steps=steps, max_epochs=epochs, num_training_batches=batches, accumulate_grad_batches=accumulate,
        global_step=0, current_epoch=0, fit_loop=SimpleNamespace(epoch_loop=at_start),
    )  # fmt: skip
    assert total_steps(trainer) == total


def test_differences_name_the_key() -> None:
    old = {"model": {"class_path": "A", "init_args": {"x": 1, "y": 2}}}
    new = {"model": {"class_path": "A", "init_args": {"x": 1, "y": 3, "z": None}}, "data": 4}
    assert differences(old, new) == ["model.y: 2 -> 3", "data: None -> 4"]
