"""What loggers are given beside numbers: the configuration, what a run is made from, and samples.

A `Tracker` takes them itself. Of Lightning's own loggers every one gets the configuration as hyperparameters, and those
with a place for texts get samples. What fails there is said once: a run does not end because of its logger.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from leyden.errors import UserError, first_line
from leyden.run.folder import flattened
from leyden.run.metrics_csv import MetricsCSV, Tracker

log = logging.getLogger("leyden")
COLUMNS = ("step", "row", "prompt", "response", "reward", "reference", "reference_reward")
"""Columns of a table of samples."""
SAMPLES = 20
"""Most samples of each evaluation that Lightning's own loggers are given; samples.jsonl has all."""


class GuardedTracker(Tracker):
    """A tracker that fails without ending the run: the first time that it does, that is said, and it is left alone.

    A subclass sets `run` where its run begins.
    """

    called: ClassVar[str]
    """What the service is called."""

    def __init__(self, project: str, samples: int) -> None:
        super().__init__()
        if samples < 0:
            raise UserError(f"--trainer.logger.samples {samples}: give 0 or more")
        self.project, self.most_samples = project, samples
        self.run: Any = None
        """The service's own, between beginning and end"""
        self._off = False

    @property
    def name(self) -> str:
        return self.project

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `begin` is given the whole configuration."""

    def _try(self, call: Callable[[], Any]) -> None:
        """Do something with the service; if that fails, say so once and leave it alone from then on."""
        if self._off:
            return
        try:
            call()
        except Exception as error:  # whatever is wrong with it, training goes on
            self._off = True
            log.warning("%s: %s; training goes on without it", self.called, brief(error))


def brief(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return first_line(error)[:200]


def cells(row: Mapping[str, Any]) -> list[Any]:
    """A row of samples.jsonl as `COLUMNS`; of the prompt the last turn."""
    return [row["prompt"][-1]["content"] if name == "prompt" else row.get(name) for name in COLUMNS]


@rank_zero_only  # type: ignore[untyped-decorator]
def begin(logger: Logger, folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Give a logger the resolved configuration, by flags without their dashes, and `made_from`: see `Tracker.begin`."""
    if isinstance(logger, Tracker):
        logger.begin(folder, config, facts)
    elif not isinstance(logger, MetricsCSV):
        flags = flattened({**config, "made_from": dict(facts)})
        _try(logger, lambda: logger.log_hyperparams(flags))
        if isinstance(logger, TensorBoardLogger):  # its hparams.yaml is written before, and not again
            text = "".join(f"    {name}: {value}\n" for name, value in flags.items())
            _try(logger, lambda: logger.experiment.add_text("config", text, 0))


@rank_zero_only  # type: ignore[untyped-decorator]
def log_samples(logger: Logger, rows: Sequence[Mapping[str, Any]]) -> None:
    """Give a logger the answers of an evaluation, rows of samples.jsonl: to MLflow as the table `eval/samples.json`,
    and to TensorBoard as the text `eval/samples`."""
    if isinstance(logger, Tracker):
        logger.samples(rows)
        return
    table = [cells(row) for row in rows[:SAMPLES]]
    if not table:
        return
    if isinstance(logger, MLFlowLogger):
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        columns = {name: list(column) for name, column in zip(COLUMNS, zip(*table, strict=True), strict=True)}
        _try(logger, lambda: logger.experiment.log_table(logger.run_id, columns, "eval/samples.json"))
    elif isinstance(logger, TensorBoardLogger):
        step = max(0, int(table[0][0]) - 1)  # as Lightning counts: finished before this one
        _try(logger, lambda: logger.experiment.add_text("eval/samples", markdown(table), step))


def markdown(table: Sequence[Sequence[Any]]) -> str:
    """Samples as a table in Markdown, in which no answer can end its cell."""
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(map(_cell, row))} |" for row in table)])


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, f"&#{ord(mark)};")
    return "<br>".join(text.splitlines())


def _try(logger: Logger, call: Callable[[], Any]) -> None:
    """Do something with a logger; where that fails, training goes on."""
    try:
        call()
    except Exception as error:  # whatever is wrong with a logger of other people
        log.warning("%s: %s; training goes on", type(logger).__name__, brief(error))
