"""Loggers: the writer of metrics.csv, and the interface of loggers that take more than numbers."""

from __future__ import annotations

import csv
import io
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from leyden.atomic import write_whole, writing
from leyden.errors import UserError


class Tracker(Logger):
    """A logger that gets a run's folder, samples and export too. All methods are called on the first process alone."""

    @abstractmethod
    def begin(self, folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Called when training starts or resumes. Numbers may have been logged before.

        Args:
            folder: of the run.
            config: the resolved configuration.
            facts: what the run is made from: algorithm, version, git, and fingerprints of base, tokenizer and data.
        """

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the answers of one evaluation pass, as rows of samples.jsonl."""

    def keep(self, export: Path) -> None:
        """Take the folder of the exported model."""


class MetricsCSV(Logger):
    """Writes every logged number to `metrics.csv` in the run's folder.

    `step` counts finished optimizer steps. Numbers logged at the same step share a row; a metric that appears late
    becomes a new column and older rows leave it empty. A row reaches the file when the next step logs, or at the end.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self.file.parent.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    @property
    def log_dir(self) -> str:
        return str(self.file.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml stands beside the file."""

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add numbers to the row of a step. Lightning passes the number of steps finished *before* this one."""
        finished = (step or 0) + 1
        if self._row.get("step") != finished:
            self.flush()
            self._row = {"step": finished}
        self._row |= metrics

    def state_dict(self, step: int, pending: Mapping[str, float]) -> dict[str, Any]:
        """The row of a step, for a checkpoint, with the numbers still to be logged. Rows before it go to the disk."""
        if self._row.get("step") != step:
            self.flush()
        if self.file.is_file():
            with writing(self.file), self.file.open("a", encoding="utf-8") as stream:
                os.fsync(stream.fileno())
        return {"step": step} | {name: _number(value) for name, value in {**self._row, **pending}.items()}

    def truncate(self, step: int, row: dict[str, Any] | None = None) -> None:
        """Remove everything after a step, to resume from a checkpoint taken there. The step's row can still grow.

        Args:
            step: of the checkpoint.
            row: the step's row in the checkpoint, since it may not have reached the file.
        """
        rows: list[dict[str, Any]] = []
        if self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            reader = csv.DictReader(line for line in lines if line.endswith("\n"))  # the last one may have been cut off
            rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) <= step]
            self._columns = list(reader.fieldnames or [])
        last: dict[str, Any] = {}
        if rows and int(rows[-1]["step"]) == step:
            last = {name: value for name, value in rows.pop().items() if value}
        if last or row:
            self._row = last | (row or {}) | {"step": step} | self._row
        if self._columns:
            self._rewrite(rows)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def flush(self) -> None:
        """Write the open row to the file."""
        if not self._row:
            return
        row, self._row = self._row, {}
        new = [name for name in row if name not in self._columns]
        if new:
            rows: list[dict[str, Any]] = []
            if self._columns and self.file.is_file():
                with self.file.open(encoding="utf-8", newline="") as stream:
                    rows = list(csv.DictReader(stream))
            self._columns += new
            self._rewrite([*rows, row])
            return
        with writing(self.file), self.file.open("a", encoding="utf-8", newline="") as stream:
            csv.DictWriter(stream, self._columns, lineterminator="\n").writerow(row)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with writing(self.file):
            write_whole(self.file, text.getvalue())

    @rank_zero_only  # type: ignore[untyped-decorator]
    def finalize(self, status: str) -> None:
        """Write what is left; after a failed run without raising an error, which would hide the first one."""
        try:
            self.flush()
        except UserError:
            if status != "failed":
                raise


def _number(value: Any) -> Any:
    """A plain number, as checkpoints hold them."""
    return value if isinstance(value, int | float | str) else float(value)
