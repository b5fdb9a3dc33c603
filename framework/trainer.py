"""A Trainer for programs that use Leyden as a library, and the callbacks of every run, which `leyden fit` has too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.plugins.io import CheckpointIO

from leyden.algorithm.trainer_checks import check_callbacks
from leyden.checkpoint.callback import Checkpoint, RNGState
from leyden.checkpoint.find import AtomicCheckpointIO, resolve_ckpt_path
from leyden.checkpoint.monitors import Monitors
from leyden.checkpoint.signals import GracefulStop
from leyden.diagnostics.callback import Diagnostics
from leyden.evaluation.evaluator import Evaluator
from leyden.run.callbacks import Export, FinalValidation, RunRecord, Throughput
from leyden.run.console import no_loading_bars, quiet_libraries
from leyden.run.folder import claim_folder
from leyden.run.metrics_csv import MetricsCSV
from leyden.run.progress import Progress, RunEstimate, Summary

DEFAULTS: dict[str, Any] = {"log_every_n_steps": 1, "use_distributed_sampler": False, "enable_model_summary": False}
"""Options of the Trainer whose defaults are others than Lightning's."""


def run_callbacks(evaluator: Evaluator | None = None) -> list[Callback]:
    """What every run measures and watches, wherever it writes.

    Args:
        evaluator: asks held-out prompts, where there is one.
    """
    callbacks: list[Callback] = [Summary(), Throughput(), RunEstimate(), RNGState(), FinalValidation(), GracefulStop()]
    return [*callbacks, Diagnostics(), *([] if evaluator is None else [evaluator])]


def folder_callbacks(folder: Path, settings: str, checkpoint: Checkpoint | None) -> list[Callback]:
    """What writes the files of a run.

    Args:
        folder: of the run.
        settings: what config.yaml is to say, as YAML.
        checkpoint: saves in `checkpoints/`, unless it has a folder; None saves nothing.
    """
    if checkpoint is not None:
        checkpoint.dirpath = checkpoint.dirpath or str(folder / "checkpoints")
    saving: list[Callback] = [] if checkpoint is None else [checkpoint]
    return [*saving, RunRecord(folder, settings), Export(folder / "export")]


class Trainer(LightningTrainer):
    """Lightning's Trainer with what `leyden fit` gives a run: a folder with `metrics.csv`, checkpoints that resume to
    the bit, `run.json` and the exported model; a progress line, a validation after the last step, and the diagnostics.

        Trainer("runs/sft", max_epochs=2).fit(algorithm, data)
        Trainer("runs/sft", max_epochs=4).fit(algorithm, data, ckpt_path="last")

    Args:
        folder: of the run. One that holds a run already is refused, unless `ckpt_path` goes on with it. None writes
            nothing: for `validate`, `test` and `predict`.
        evaluator: asks held-out prompts before, during and after training, such as `leyden.datamodules.Evaluation`.
        checkpoint: when to save; None is a `Checkpoint` with its defaults.
        settings: what `config.yaml` says of the run, such as `{"model": {"class_path": "my_file.MyAlgorithm"}}`. Runs
            whose settings are equal are seeds of one to `leyden compare`; without any, a run stands for itself.
        options: those of Lightning's Trainer. Without `max_epochs`, `max_steps` and `max_time` there is one epoch.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        evaluator: Evaluator | None = None,
        checkpoint: Checkpoint | None = None,
        settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        quiet_libraries()
        no_loading_bars()
        self.folder = None if folder is None or options.get("fast_dev_run") else Path(folder)
        options = DEFAULTS | options
        if options.get("max_epochs") is None:  # Lightning would take 1000 epochs
            bounded = options.get("max_steps", -1) >= 0 or options.get("max_time") is not None
            options["max_epochs"] = -1 if bounded else 1
        given = _listed(options.pop("callbacks", None))
        check_callbacks(given)
        callbacks = [] if options.get("enable_progress_bar") is False else [Progress()]
        callbacks += run_callbacks(evaluator)
        logger = options.pop("logger", None)
        if self.folder is not None:
            saves = options.get("enable_checkpointing") is not False
            self._checkpoint = checkpoint or Checkpoint()
            told = yaml.safe_dump(dict(settings or {}), allow_unicode=True, sort_keys=False)
            callbacks += folder_callbacks(self.folder, told, self._checkpoint if saves else None)
            loggers = False if logger is False else [MetricsCSV(self.folder), *_listed(logger or None)]
            options["default_root_dir"] = str(self.folder)
        else:
            loggers, options["enable_checkpointing"] = _listed(logger or None) or False, False
        own = [c for c in callbacks if not any(isinstance(other, type(c)) for other in given)]
        plugins = _listed(options.pop("plugins", None))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        super().__init__(callbacks=[Monitors(), *given, *own], logger=loggers, plugins=plugins, **options)

    def fit(self, model: LightningModule, *args: Any, ckpt_path: str | None = None, **options: Any) -> None:
        """Train, and write into the folder.

        Args:
            model: the algorithm.
            args: the DataModule, as for Lightning.
            ckpt_path: a checkpoint to go on from, `last` of this folder, or `auto`: the last one if there is one.
            options: as for Lightning.

        Raises:
            UserError: the folder holds a run already, there is no such checkpoint, or a setting that cannot work.
        """
        if self.folder is None:
            super().fit(model, *args, ckpt_path=ckpt_path, **options)
            return
        dirpath = self._checkpoint.dirpath
        found = resolve_ckpt_path(ckpt_path, "fit", str(self.folder), None if dirpath is None else str(dirpath))
        name = type(model).__name__.lower()
        claimed = claim_folder(str(self.folder), name, resume=ckpt_path is not None, alone=True)
        try:
            super().fit(model, *args, ckpt_path=found, **options)
        finally:
            claimed.release()


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, Sequence) else [value]
