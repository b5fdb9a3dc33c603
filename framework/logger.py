"""metrics.csv: one row per optimizer step at which something was logged."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from leyden.run import write_whole


class MetricsCSV(Logger):
    """Writes every logged number to `metrics.csv` in the run's folder.

    `step` counts finished optimizer steps. Numbers logged at the same step share a row; a metric that appears late
    becomes a new column and older rows leave it empty. A row reaches the file when the next step logs, or at the end.
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
        """Nothing: config.yaml stands beside the file."""

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add numbers to the row of a step. Lightning passes the number of steps finished *before* this one."""
        finished = (step or 0) + 1
        if self._row.get("step") != finished:
            self.flush()
            self._row = {"step": finished}
        self._row |= metrics

    def cut(self, step: int) -> None:
        """Forget everything after a step, to go on from a checkpoint taken there. The step's row can still grow."""
        if not self.file.is_file():
            return
        with self.file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            kept = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) <= step]
            self._columns = list(reader.fieldnames or [])
        if kept and int(kept[-1]["step"]) == step:
            last = {name: value for name, value in kept.pop().items() if value}
            self._row = last | {"step": step} | self._row
        self._rewrite(kept)

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
        with self.file.open("a", encoding="utf-8", newline="") as stream:
            csv.DictWriter(stream, self._columns, lineterminator="\n").writerow(row)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.file, text.getvalue())

    @rank_zero_only  # type: ignore[untyped-decorator]
    def finalize(self, status: str) -> None:
        self.flush()
