"""Runs in trackio: a dashboard on this machine (`trackio show`), or in a Space of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from leyden.atomic import write_whole
from leyden.errors import UserError
from leyden.run.trackers import COLUMNS, GuardedTracker, cells


class Trackio(GuardedTracker):
    """Logs what metrics.csv holds under the same names and steps, the resolved configuration with what the run is made
    from, and samples. A run that goes on from a checkpoint goes on in trackio. Where trackio fails, training goes on.

    Args:
        project: in trackio.
        name: None is the name of the run's folder.
        group: of runs that belong together, such as seeds of one setting.
        space: of Hugging Face, `user/name`, to log to; None is this machine (`$TRACKIO_DIR`).
        samples: most answers that each evaluation adds as a table.
    """

    called = "trackio"

    def __init__(
        self,
        project: str = "leyden",
        name: str | None = None,
        group: str | None = None,
        space: str | None = None,
        samples: int = 20,
    ) -> None:
        super().__init__(project, samples)
        try:
            import trackio  # noqa: F401
        except ImportError as error:
            raise UserError("--trainer.logger leyden.trackio.Trackio: not installed; pip install trackio") from error
        self.run_name, self.group, self.space = name, group, space
        self._rows: list[dict[str, Any]] = []
        """Rows that are not sent yet, the last of which can still grow."""

    @property
    def version(self) -> str | None:
        return None if self.run is None else str(self.run.name)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def begin(self, folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        import trackio

        known = folder / "trackio-run"
        resumed = known.is_file()
        name = known.read_text(encoding="utf-8").strip() if resumed else self.run_name or folder.resolve().name

        def start() -> None:
            with redirect_stdout(StringIO()):  # how to open the dashboard stands in the documentation
                self.run = trackio.init(
                    self.project, name, self.group, space_id=self.space, resume="allow" if resumed else "never",
                    config={**config, "made_from": dict(facts)}, embed=False, auto_log_gpu=False, auto_log_cpu=False,
                )  # fmt: skip
            write_whole(known, str(self.run.name))

        self._try(start)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add numbers to the row of a step. Lightning passes the number of steps finished *before* this one."""
        self._add((step or 0) + 1, metrics)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows or not self.most_samples:
            return

        def add() -> None:
            import pandas as pd
            import trackio

            frame = pd.DataFrame([cells(row) for row in rows[: self.most_samples]], columns=list(COLUMNS))
            self._add(int(rows[0]["step"]), {"eval/samples": trackio.Table(dataframe=frame)})

        self._try(add)

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._rows or self._rows[-1]["step"] != step:
            self._send()
            self._rows.append({"step": step})
        self._rows[-1] |= values

    def _send(self) -> None:
        """Send what is there, once the run has begun."""
        if self.run is None or self._off:
            return
        rows, self._rows = self._rows, []
        for row in rows:
            values = {name: value if name == "eval/samples" else float(value) for name, value in row.items()}
            self._try(lambda values=values: self.run.log(values, step=int(values.pop("step"))))  # type: ignore[misc]

    @rank_zero_only  # type: ignore[untyped-decorator]
    def finalize(self, status: str) -> None:
        self._send()
        if self.run is not None:
            import trackio

            with redirect_stdout(StringIO()):
                self._try(trackio.finish)  # the run's own `finish` would be called again when the process ends
        self.run, self._off = None, True
