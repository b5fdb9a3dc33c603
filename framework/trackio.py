"""Runs in trackio: a dashboard on this machine (`trackio show`), or in a Space of Hugging Face."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from leyden.atomic import write_whole
from leyden.errors import UserError, first_line
from leyden.run.metrics_csv import Tracker
from leyden.run.trackers import COLUMNS, cells

log = logging.getLogger("leyden")


class Trackio(Tracker):
    """Logs what metrics.csv holds under the same names and steps, the resolved configuration with what the run is made
    from, and samples. A run that goes on from a checkpoint goes on in trackio. Where trackio fails, training goes on.

    Args:
        project: in trackio.
        name: None is the name of the run's folder.
        group: of runs that belong together, such as seeds of one setting.
        space: of Hugging Face, `user/name`, to log to; None is this machine (`$TRACKIO_DIR`).
        samples: most answers that each evaluation adds as a table.
    """

    def __init__(
        self,
        project: str = "leyden",
        name: str | None = None,
        group: str | None = None,
        space: str | None = None,
        samples: int = 20,
    ) -> None:
        super().__init__()
        if samples < 0:
            raise UserError(f"--trainer.logger.samples {samples}: give 0 or more")
        try:
            import trackio  # noqa: F401
        except ImportError as error:
            raise UserError("--trainer.logger leyden.trackio.Trackio: not installed; pip install trackio") from error
        self.project, self.run_name, self.group, self.space = project, name, group, space
        self.most_samples = samples
        self.run: Any = None
        self._rows: list[dict[str, Any]] = []
        """Rows that are not sent yet, the last of which can still grow."""
        self._off = False

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return None if self.run is None else str(self.run.name)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `begin` is given the whole configuration."""

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

    def _try(self, call: Callable[[], Any]) -> None:
        """Do something with trackio; if that fails, say so once and leave it alone from then on."""
        if self._off:
            return
        try:
            call()
        except Exception as error:  # whatever is wrong with it, training goes on
            self._off = True
            log.warning("trackio: %s; training goes on without it", first_line(error)[:200])

    @rank_zero_only  # type: ignore[untyped-decorator]
    def finalize(self, status: str) -> None:
        self._send()
        if self.run is not None:
            import trackio

            with redirect_stdout(StringIO()):
                self._try(trackio.finish)  # the run's own `finish` would be called again when the process ends
        self.run, self._off = None, True
