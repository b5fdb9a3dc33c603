"""The files in one run's folder. They may be missing, unfinished or damaged: what can be read is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leyden.compare.benchmarks import FILE, Result, add_series, read_benchmarks
from leyden.compare.metrics import Series, read_metrics
from leyden.compare.records import is_diagnostic, is_sample, read_config, read_object, read_rows


@dataclass(eq=False)
class RunFiles:
    """The content of a run's folder.

    `config` is config.yaml, `facts` evaluation.json (None: the run was not evaluated), `info` run.json; each is empty
    where the file is missing. `samples` are the answers of the last evaluation. `notes` say what could not be read.
    """

    folder: Path
    name: str
    series: Series = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] | None = None
    info: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    benchmarks: dict[str, Result] = field(default_factory=dict)
    """Column -> result of `leyden benchmark`"""

    @property
    def algorithm(self) -> str:
        """The class's short name, as in `--model PPO`."""
        model = self.config.get("model")
        path = model.get("class_path", "") if isinstance(model, dict) else ""
        return str(path).rpartition(".")[2] or str(self.info.get("algorithm") or "run")

    @property
    def steps(self) -> int:
        """Optimizer steps that were finished when the run last logged."""
        return max((points[-1][0] for points in self.series.values()), default=0)

    @property
    def evaluated(self) -> bool:
        return any(column.startswith("eval/") for column in self.series)

    def final(self, column: str) -> float | None:
        """The last number of a column; the highest, where it is a peak."""
        points = self.series.get(column)
        if not points:
            return None
        return max(value for _, value in points) if "peak" in column else points[-1][1]

    def at(self, column: str, step: int) -> float | None:
        """The last number of a column at or before a step; before the first number None, but 0 at step 0."""
        values = [value for when, value in self.series.get(column, ()) if when <= step]
        return values[-1] if values else 0.0 if step == 0 and column in self.series else None


def was_trained(folder: Path) -> bool:
    """Whether a folder holds what a training leaves."""
    return (folder / "metrics.csv").is_file() or (folder / "config.yaml").is_file()


def read_run(folder: Path, name: str) -> RunFiles:
    """Read a run's folder; `name` is the run's name in tables."""
    run = RunFiles(folder, name)
    notes = run.notes
    if not (folder / FILE).is_file() or was_trained(folder):  # else the results of a model that was not trained here
        run.series = read_metrics(folder / "metrics.csv", notes)
        run.config = read_config(folder / "config.yaml", notes)
    run.facts = read_object(folder / "evaluation.json", notes)
    run.info = read_object(folder / "run.json", notes) or {}
    samples = read_rows(folder / "samples.jsonl", is_sample, notes)
    last = max((row["step"] for row in samples), default=0)
    run.samples = [row for row in samples if row["step"] == last]
    run.diagnostics = read_rows(folder / "diagnostics.jsonl", is_diagnostic, notes)
    retained = run.series.get("eval/retained_loss")
    if retained and retained[0][0] == 0:  # forgetting is measured from an evaluation pass before training
        run.series["eval/forgetting"] = [(step, loss - retained[0][1]) for step, loss in retained]
    run.benchmarks = read_benchmarks(folder, notes)
    add_series(run.series, run.benchmarks, run.steps)
    return run
