"""Any logger from YAML gets the names of metrics.csv, the configuration and samples, in the real packages, offline."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run

from leyden.run.trackers import COLUMNS, begin, markdown

pytest.importorskip("tensorboard")
mlflow = pytest.importorskip("mlflow")
pytest.importorskip("trackio")
FIT = [
    *("--config", "demo", "--config", "lora", "--config", "eval", "--config", "loggers.yaml"),
    *("--data.path", "answers.jsonl", "--eval.path", "answers.jsonl", "--eval.reward", "Gold"),
    *("--eval.sampling.max_new_tokens", "4", "--eval.size", "3", "--trainer.default_root_dir", "run"),
]
LOGGERS = [
    {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "tensorboard"}},
    {"class_path": "CSVLogger", "init_args": {"save_dir": "csv"}},
    {"class_path": "MLFlowLogger", "init_args": {"experiment_name": "leyden", "tracking_uri": "sqlite:///mlflow.db"}},
    {"class_path": "leyden.trackio.Trackio", "init_args": {"project": "leyden"}},
]
Numbers = dict[str, dict[int, float]]
"""Name -> step -> number."""


@pytest.fixture
def trained(leyden: Run, workplace: Path) -> Path:
    """A folder with a run of two steps that was logged to all of them, by a process of its own."""
    leyden("data", "sample", "--language", "ko", "--kind", "instruction", "--rows", "40", "--output", "answers.jsonl")
    Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": LOGGERS}}), encoding="utf-8")
    command = [sys.executable, "-m", "leyden", "fit", *FIT, "--trainer.max_steps", "2"]
    environment = os.environ | {"TRACKIO_DIR": str(workplace / "trackio")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "training goes on" not in said and "Uploading" not in said, said
    return workplace


def of_the_run(folder: Path) -> Numbers:
    """metrics.csv."""
    numbers: Numbers = {}
    with (folder / "run" / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            for name, value in row.items():
                if value and name != "step":
                    numbers.setdefault(name, {})[int(row["step"])] = float(value)
    return numbers


def same(theirs: Numbers, ours: Numbers, shift: int) -> None:
    """Every name and number of metrics.csv is there. Lightning's loggers count steps from 0."""
    for name, points in ours.items():
        found = {step + shift: value for step, value in theirs[name].items()}
        assert found == pytest.approx(points, rel=1e-6), name


@pytest.mark.filterwarnings("ignore")  # of other people's programs
def test_every_logger_has_the_same(trained: Path) -> None:
    ours = of_the_run(trained)
    assert {"train/loss", "val/loss", "eval/reward", "eval/kl", "perf/tokens_per_second"} <= set(ours)
    answers = [json.loads(line) for line in (trained / "run" / "samples.jsonl").read_text("utf-8").splitlines()]
    in_tensorboard(trained, ours, answers)
    in_csv(trained, ours)
    in_mlflow(ours, answers)
    in_trackio(ours, answers)


def in_tensorboard(folder: Path, ours: Numbers, answers: list[dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (version,) = (folder / "tensorboard").glob("*/version_0")
    events = EventAccumulator(str(version), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    theirs = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    same(theirs, ours, 1)
    texts = {
        name.removesuffix("/text_summary"): "\n".join(
            e.tensor_proto.string_val[0].decode() for e in events.Tensors(name)
        )
        for name in events.Tags()["tensors"]
    }
    config = yaml.safe_load(texts["config"])
    assert config["model"] == "leyden.algos.SFT" and config["made_from.algorithm"] == "SFT"
    assert all(row["prompt"][-1]["content"].splitlines()[0] in texts["eval/samples"] for row in answers)


def in_csv(folder: Path, ours: Numbers) -> None:
    (version,) = (folder / "csv").glob("*/version_0")
    theirs: Numbers = {}
    with (version / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            for name, value in row.items():
                if value:
                    theirs.setdefault(name, {})[int(row["step"])] = float(value)
    same(theirs, ours, 1)
    config = yaml.safe_load((version / "hparams.yaml").read_text(encoding="utf-8"))
    assert config["data.path"] == "answers.jsonl" and config["trainer.max_steps"] == "2"


def in_mlflow(ours: Numbers, answers: list[dict[str, Any]]) -> None:
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("leyden").experiment_id])
    theirs = {
        name: {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }
    same(theirs, ours, 1)
    assert run.data.params["model"] == "leyden.algos.SFT" and run.info.status == "FINISHED"
    file = client.download_artifacts(run.info.run_id, "eval/samples.json")
    table = json.loads(Path(file).read_text(encoding="utf-8"))
    assert table["columns"] == list(COLUMNS)
    assert [row[COLUMNS.index("response")] for row in table["data"]] == [row["response"] for row in answers]


def in_trackio(ours: Numbers, answers: list[dict[str, Any]]) -> None:
    script = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as s; "
        "print(json.dumps([s.get_logs('leyden', 'run'), s.get_run_config('leyden', 'run')]))"
    )
    environment = os.environ | {"TRACKIO_DIR": str(Path("trackio").resolve())}  # read when trackio is imported
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    rows, config = json.loads(done.stdout.splitlines()[-1])
    theirs: Numbers = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float):
                theirs.setdefault(name, {})[int(row["step"])] = float(value)
    same(theirs, ours, 0)
    assert config["model"]["class_path"] == "leyden.algos.SFT" and config["made_from"]["algorithm"] == "SFT"
    tables = [row["eval/samples"]["_value"] for row in rows if "eval/samples" in row]
    assert [cell["response"] for table in tables for cell in table] == [row["response"] for row in answers]


def test_a_logger_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from lightning.pytorch.loggers import CSVLogger

    class Broken(CSVLogger):
        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("no space left")

    with caplog.at_level("WARNING", "leyden"):
        begin(Broken(tmp_path), tmp_path, {"a": {"b": 1}}, {})
    assert [record.getMessage() for record in caplog.records] == ["Broken: no space left; training goes on"]


def test_no_answer_ends_its_cell() -> None:
    text = markdown([[1, 0, "a|b\nc", "<script>*x*", 0.123456, None, None]])
    assert text.splitlines()[2] == "| 1 | 0 | a&#124;b<br>c | &#60;script&#62;&#42;x&#42; | 0.1235 |  |  |"
