"""Runs in Weights & Biases, side by side whatever they were trained by; without an account they are kept on disk."""

from __future__ import annotations

import csv
import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_only

from leyden.atomic import write_whole
from leyden.run.trackers import COLUMNS, GuardedTracker, brief, cells

log = logging.getLogger("leyden")
AXES = ("train/tokens", "train/samples", "train/seconds")
"""What runs can be compared over beside optimizer steps; every row has them."""


class WandB(GuardedTracker):
    """Logs what metrics.csv holds, the resolved configuration, what the run is made from, samples, and the adapter.

    The job type is the algorithm, and the x axis the optimizer step; tokens, samples and seconds of training stand in
    every row. A run that goes on from a checkpoint goes on in W&B. W&B is never waited for: where it cannot be reached,
    the run goes on, and `wandb sync` sends later what was kept in the run's folder.

    Args:
        project: in W&B.
        entity: user or team; None is the account's own.
        group: of runs that belong together, such as seeds of one setting.
        name: None is the name of the run's folder.
        tags: words to find runs by.
        mode: `auto` is online where somebody has logged in, and else offline.
        samples: most answers that each evaluation pass adds to the table.
        artifact: whether an exported adapter is uploaded.
        patience: seconds to wait for W&B when the run begins, before it goes on offline.
    """

    called = "W&B"

    def __init__(
        self,
        project: str = "leyden",
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["auto", "online", "offline"] = "auto",
        samples: int = 20,
        artifact: bool = True,
        patience: float = 30.0,
    ) -> None:
        super().__init__(project, samples)
        self.entity, self.group, self.run_name, self.tags = entity, group, name, list(tags)
        self.mode, self.artifact, self.patience = mode, artifact, patience
        self._table: Any = None
        self._row: dict[str, Any] = {}
        self._axes = dict.fromkeys(AXES, 0.0)
        self._early: list[dict[str, Any]] = []
        """Rows from before the run began."""

    @property
    def version(self) -> str | None:
        return None if self.run is None else str(self.run.id)

    # -- the run -----------------------------------------------------------------------------------------------------

    @rank_zero_only  # type: ignore[untyped-decorator]
    def begin(self, folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        import wandb

        known = folder / "wandb-id"
        number = known.read_text(encoding="utf-8").strip() if known.is_file() else secrets.token_hex(4)
        self._axes |= {name: value for name, value in _last(folder).items() if name in AXES}
        options: dict[str, Any] = dict(
            project=self.project, entity=self.entity, group=self.group, name=self.run_name or folder.name,
            job_type=str(facts["algorithm"]), tags=self.tags, resume="allow",
            # W&B writes in a process of its own, whose current folder is that of the first run.
            dir=str(folder.resolve()),
            config={**config, "made_from": dict(facts)}, reinit="finish_previous",
        )  # fmt: skip
        mode = self.mode if self.mode != "auto" else "online" if _logged_in() else "offline"
        for chosen in dict.fromkeys((mode, "offline")):
            try:
                settings = wandb.Settings(init_timeout=self.patience)
                self.run = wandb.init(mode=chosen, id=number, settings=settings, **options)
                break
            except Exception as error:  # whatever is wrong with it, training goes on
                number = secrets.token_hex(4)  # the first one counts as in use
                log.warning("W&B (%s): %s", chosen, brief(error))
        else:
            self._off = True
            return
        write_whole(known, number)
        self._try(self._define)
        for row in self._early:
            self._send(row)
        self._early = []
        if self.run.settings.mode == "offline":
            kept = folder / "wandb" / Path(self.run.dir).parent.name
            log.info("W&B: offline; wandb sync %s sends it once you have logged in", kept)

    def _define(self) -> None:
        self.run.define_metric("step")
        for name in AXES:
            self.run.define_metric(name, step_metric="step")
        self.run.define_metric("*", step_metric="step")

    # -- numbers, samples, files -------------------------------------------------------------------------------------

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add numbers to the row of a step. Lightning passes the number of steps finished *before* this one."""
        finished = (step or 0) + 1
        if self._row.get("step") != finished:
            self._flush()
            self._row = {"step": finished}
        self._row |= metrics
        self._axes |= {name: float(metrics[name]) for name in AXES if name in metrics}

    def _flush(self) -> None:
        if len(self._row) > 1:
            row = self._axes | self._row
            if self.run is None and not self._off:
                self._early.append(row)
            else:
                self._send(row)
        self._row = {}

    def _send(self, row: dict[str, Any]) -> None:
        self._try(lambda: self.run.log(row))

    @rank_zero_only  # type: ignore[untyped-decorator]
    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add answers to one table, which keeps those of earlier passes."""
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(COLUMNS), log_mode="MUTABLE")
        for row in rows[: self.most_samples]:
            self._table.add_data(*cells(row))
        self._row |= {"eval/samples": self._table} if self.most_samples else {}

    @rank_zero_only  # type: ignore[untyped-decorator]
    def keep(self, export: Path) -> None:
        if self.run is not None and self.artifact and (export / "adapter_config.json").is_file():
            import wandb

            def upload() -> None:
                artifact = wandb.Artifact(f"adapter-{self.run.id}", type="model")
                artifact.add_dir(str(export))
                self.run.log_artifact(artifact)

            self._try(upload)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def finalize(self, status: str) -> None:
        self._flush()
        if self.run is None:
            return
        ending = threading.Thread(target=lambda: self._try(lambda: self.run.finish(0 if status == "success" else 1)),
                                  daemon=True)  # fmt: skip
        ending.start()
        ending.join(60)
        if ending.is_alive():
            log.warning("W&B: not reached for a minute; wandb sync %s sends the rest", Path(self.run.dir).parent)
        self.run = None
        self._off = True


def _logged_in() -> bool:
    """Whether there is a key for W&B here; looked up without asking anybody."""
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except Exception:
        return False


def _last(folder: Path) -> dict[str, float]:
    """The axes where the run stands already, so that the first rows of a resumed run have them."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: float(value) for row in rows for name, value in row.items() if name in AXES and value}
