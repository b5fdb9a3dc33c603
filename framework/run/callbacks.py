"""Callbacks that measure a run and write its files. The command line adds all of them; one of the same class in the
configuration takes its place."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from leyden.atomic import remove_unfinished, replacing, write_whole, writing
from leyden.language import say
from leyden.lightning_loop import is_accumulating, is_last_planned_step, pending_metrics, validation_follows
from leyden.run.flops import flops_per_token, peak_flops
from leyden.run.folder import changed_settings, revision
from leyden.run.metrics_csv import MetricsCSV, Tracker
from leyden.run.trackers import begin


class Throughput(Callback):
    """Logs `perf/tokens_per_second` (real tokens of all processes, over the last steps, pauses for validation left
    out), `perf/peak_memory_gb` (10^9 bytes: on a GPU of tensors, else of the process) and `train/seconds`; where the
    peak of the device is known, `perf/flops_share`: the share of it that the policy's arithmetic on these tokens is.

    Args:
        window: optimizer steps that the speed is averaged over.
    """

    def __init__(self, window: int = 20) -> None:
        self.seconds = 0.0
        self._last: tuple[float, float] | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=window)
        self._share: float | None = None
        """The share of all devices' peak that one token a second takes."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (peak := peak_flops(pl_module.device)) is not None:
            sampled = pl_module.on_policy  # its reference reads each token once a rollout, not in every step
            self._share = (
                flops_per_token(pl_module.policy, pl_module.has_reference and not sampled) / peak / trainer.world_size
            )

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = float(state_dict["seconds"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._last is None:
            self._last = (time.monotonic(), pl_module.progress["tokens"])

    def pause(self, seconds: float = 0.0) -> None:
        """Leave the time until the next batch out of the measured time."""
        self._last = None

    def on_validation_start(self, *args: Any) -> None:
        self.pause()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._last is None or is_accumulating(trainer):
            return
        now, tokens = time.monotonic(), pl_module.progress["tokens"]
        elapsed = now - self._last[0]
        self._recent.append((elapsed, tokens - self._last[1]))
        self._last = (now, tokens)
        self.seconds += elapsed
        speed = sum(t for _, t in self._recent) / max(sum(s for s, _ in self._recent), 1e-9)
        pl_module.log("perf/tokens_per_second", speed, on_step=True, on_epoch=False)
        if self._share is not None:
            pl_module.log("perf/flops_share", speed * self._share, on_step=True, on_epoch=False)
        pl_module.log("perf/peak_memory_gb", peak_memory_gb(pl_module.device), on_step=True, on_epoch=False)
        pl_module.log("train/seconds", self.seconds, on_step=True, on_epoch=False)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far in 10^9 bytes: of tensors on a GPU, else of this process; 0.0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


class RunRecord(Callback):
    """Writes the resolved config.yaml, and run.json with the run's provenance, once training really starts. On resume
    it prints what changed and cuts metrics.csv, whose last row comes from the checkpoint: the file may not have it
    yet.

    Args:
        folder: the run's folder.
        config: the resolved configuration as YAML.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, config
        self._row: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            remove_unfinished(self.folder)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in _metrics_loggers(trainer):
            checkpoint["metrics"] = logger.state_dict(trainer.global_step, pending_metrics(trainer))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._row = checkpoint.get("metrics")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        facts = pl_module.made_from() | {"git": revision()}
        if not trainer.is_global_zero:
            return
        if trainer.ckpt_path is not None:
            say(f"resuming {self.folder} at step {trainer.global_step}", file=sys.stderr)
            for line in changed_settings(self.folder, self.config):
                say(f"  changed: {line}", file=sys.stderr)
            for logger in _metrics_loggers(trainer):
                logger.truncate(trainer.global_step, self._row)
        with writing(self.folder / "config.yaml"):
            write_whole(self.folder / "config.yaml", self.config)
            write_whole(self.folder / "run.json", json.dumps(facts, ensure_ascii=False, indent=2) + "\n")
        for logger in trainer.loggers:
            begin(logger, self.folder, yaml.safe_load(self.config), facts)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        # Lightning counts a step at the end of the validation that follows it. A checkpoint of that validation would
        # lack the step if the validation is not due again on resume.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def _metrics_loggers(trainer: Trainer) -> list[MetricsCSV]:
    """The loggers of metrics.csv; none on other processes than the first, which writes the file."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV) and trainer.is_global_zero]


class FinalValidation(Callback):
    """Validates after the last step too, where no validation was due anyway."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Validate in the hook of the step, so that its checkpoint comes afterwards and can be resumed from."""
        if not is_accumulating(trainer) and is_last_planned_step(trainer) and not validation_follows(trainer):
            first = trainer._logger_connector._first_loop_iter
            self._run(trainer, pl_module)
            trainer._logger_connector._first_loop_iter = first

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(trainer, pl_module)

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation or pl_module.validated_at == trainer.global_step:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True


class Export(Callback):
    """Saves the policy when training ends, as a folder that transformers (and PEFT, for an adapter) load by themselves.

    Args:
        folder: of the export; an older export there is replaced.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        if not trainer.is_global_zero:
            if pl_module.device_mesh is not None:
                pl_module.policy.save(None)
            return
        with writing(self.folder), replacing(self.folder) as temporary:
            pl_module.policy.save(temporary)
        say(f"exported to {self.folder}")
        for logger in trainer.loggers:
            if isinstance(logger, Tracker):
                logger.keep(self.folder)
