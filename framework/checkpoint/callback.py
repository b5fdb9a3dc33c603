"""Callbacks that save checkpoints, at optimizer steps only, and the states of all random generators in them."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from leyden.distributed import all_gather
from leyden.errors import UserError
from leyden.lightning_loop import (
    is_accumulating,
    is_last_planned_step,
    is_stopping_early,
    logged_metrics,
    step_metrics,
    validation_follows,
)
from leyden.rng import rng_states, set_rng_states


class Checkpoint(ModelCheckpoint):
    """The checkpoint group of the command line: Lightning's ModelCheckpoint, saving at optimizer steps.

    By default every 500 optimizer steps and at the last one, keeping the newest. A step that validation or the end of
    an epoch follows is saved after that. What ends training before its planned end is saved too, as last.ckpt where the
    best are kept: SIGTERM, Ctrl-C, `--trainer.max_time`, a callback such as EarlyStopping.

    Args:
        dirpath: where they go; None is `checkpoints` in the run's folder.
        filename: name of a file, with logged measures in braces.
        monitor: any logged measure, such as val/loss or eval/reward: the best are kept, judged whenever it is new.
        save_last: whether the newest is kept beside them, as last.ckpt (a link to one of them where that will do).
        save_top_k: how many of the best are kept; without a measure 1 (the newest) or -1 (all).
        mode: whether min or max is best.
        every_n_train_steps: optimizer steps between two checkpoints.
        train_time_interval: time between two: DAYS:HOURS:MINUTES:SECONDS, or without days.
        every_n_epochs: epochs between two.
        verbose: say when one is saved.
        save_weights_only: leave out the state that resuming needs.
        auto_insert_metric_name: put the name of a measure before its number in `filename`.
        enable_version_counter: number files of the same name, and replace none.
        prune: remove all checkpoints once training has come to its planned end and the export is written: for runs
            that nobody goes on with.
    """

    save_last: Any
    _last_time_checked: float | None

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = "{step:06d}",
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: str | timedelta | None = None,
        every_n_epochs: int | None = None,
        enable_version_counter: bool = False,
        prune: bool = False,
    ) -> None:
        if all(trigger is None for trigger in (monitor, every_n_train_steps, every_n_epochs, train_time_interval)):
            every_n_train_steps = 500
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            verbose=verbose,
            save_last=save_last,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=interval(train_time_interval),
            every_n_epochs=every_n_epochs,
            enable_version_counter=enable_version_counter,
        )
        self.prune = prune
        self._due = False
        """Whether this step is to be saved."""
        self._measured, self._judged, self._last = -1, -1, 0
        """The steps that were measured, judged (or saved, without a measure) and kept as last.ckpt most lately."""

    @property
    def state_key(self) -> str:
        """The same when another rhythm is asked for on resume, so that the best stay the best."""
        return str(self._generate_state_key(monitor=self.monitor, mode=self.mode))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Files are looked for where they are now: the folder may have been moved, and some of them removed."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else ""

        self.best_model_path = here(state_dict["best_model_path"])
        self.last_model_path = here(state_dict["last_model_path"])
        self.current_score = state_dict["current_score"]
        judged = {here(path): value for path, value in state_dict["best_k_models"].items()}
        self.best_k_models = {path: value for path, value in judged.items() if Path(path).exists()}
        if self.best_k_models:
            order = sorted(self.best_k_models, key=lambda path: float(judged[path]), reverse=self.mode == "max")
            self.best_model_path, self.kth_best_model_path = order[0], order[-1]
            self.best_model_score, self.kth_value = judged[order[0]], judged[order[-1]]

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if is_accumulating(trainer):
            return
        self._due |= self._rhythm(trainer) or is_last_planned_step(trainer)
        if is_stopping_early(trainer) or (self._due and not validation_follows(trainer) and not trainer.is_last_batch):
            self._keep(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        if trainer.sanity_checking:
            return
        if self.monitor in logged_metrics(trainer):
            self._measured, self._due = trainer.global_step, True
        if is_stopping_early(trainer) or (self._due and not trainer.is_last_batch):
            self._keep(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor in logged_metrics(trainer):
            self._measured, self._due = trainer.global_step, True
        if trainer.is_last_batch and (self._due or is_stopping_early(trainer)):
            self._keep(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing: in the middle of a step there is nothing to go on from; see `GracefulStop`."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due:  # a validation that came only because training ended
            self._keep(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove what a run that has ended, its export included, needs no more. An error comes past here."""
        if self.prune and stage == "fit" and self._reached_end(trainer) and trainer.is_global_zero:
            files = {*self.best_k_models, self.best_model_path, self.last_model_path} - {""}
            if Path(str(self.dirpath)).parent == Path(trainer.default_root_dir):  # no other run keeps any there
                files |= {str(file) for file in Path(str(self.dirpath)).glob("*.ckpt")}
            for file in sorted(files):
                trainer.strategy.remove_checkpoint(file)

    @staticmethod
    def _reached_end(trainer: Trainer) -> bool:
        ended = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch
        return bool(ended or 0 <= trainer.max_steps <= trainer.global_step)

    def _rhythm(self, trainer: Trainer) -> bool:
        """Whether the steps, the epochs or the time between two checkpoints are over with this batch."""
        if self._every_n_train_steps >= 1 and trainer.global_step % self._every_n_train_steps == 0:
            return True
        if self._every_n_epochs >= 1 and trainer.is_last_batch:
            return bool((trainer.current_epoch + 1) % self._every_n_epochs == 0)
        if self._train_time_interval is None or self._last_time_checked is None:
            return False
        over = time.monotonic() - self._last_time_checked >= self._train_time_interval.total_seconds()
        over = bool(trainer.strategy.broadcast(over))  # clocks differ
        self._last_time_checked = time.monotonic() if over else self._last_time_checked
        return over

    def _keep(self, trainer: Trainer) -> None:
        """Save this step as what it has to be saved as, unless it has been."""
        step, self._due = trainer.global_step, False
        if trainer.fast_dev_run or step == 0:
            return
        candidates = self._monitor_candidates(trainer)
        new = self._measured == step or self.monitor in step_metrics(trainer)
        if self._judged != step and (self.monitor is None or new):
            self._judged = step
            self._save_topk_checkpoint(trainer, candidates)
        saved = self._last_global_step_saved == step
        if self._last != step and (self.save_last or (is_stopping_early(trainer) and not saved)):
            self._last, asked = step, self.save_last
            self.save_last = asked if asked == "link" and saved else True
            self._save_last_checkpoint(trainer, candidates)
            self.save_last = asked

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Also the one that was resumed from, once it is no longer among those to keep."""
        return previous != current and Path(str(self.dirpath)).absolute() in Path(previous).absolute().parents


def interval(text: str | timedelta | None) -> timedelta | None:
    """A time between two checkpoints: `00:00:30:00` is half an hour, as in `--trainer.max_time`, and so is `00:30:00`.

    Raises:
        UserError: it is written otherwise.
    """
    if not isinstance(text, str):
        return text
    if not (match := re.fullmatch(r"(?:(\d+):)?(\d+):(\d+):(\d+)", text.strip())):
        raise UserError(
            f"--checkpoint.train_time_interval {text}: give DAYS:HOURS:MINUTES:SECONDS, such as 00:00:30:00"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


class RNGState(Callback):
    """Keeps the random generators of every process in the checkpoint and sets them back on resume.

    They are set as late as possible, when the first batch starts: the sanity check and the loaders draw from them too.
    What validation draws (a reward of yours may) is put back, so that training is the same however often it validates.
    """

    _KEY = "random_generators"

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._before: dict[str, Any] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[self._KEY] = all_gather(rng_states())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(self._KEY)
        if states is None or trainer.state.fn != "fit":
            return
        if len(states) != trainer.world_size:
            raise UserError(
                f"the checkpoint was written by {len(states)} processes and this run has {trainer.world_size}; "
                "resume with the same number (--trainer.devices, --trainer.num_nodes)"
            )
        self._restored = states[trainer.global_rank]

    def on_train_batch_start(self, *args: Any) -> None:
        if self._restored is not None:
            set_rng_states(self._restored)
            self._restored = None

    def on_train_batch_end(self, *args: Any) -> None:
        self._before = rng_states()  # making an iterator for validation draws too

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before and not trainer.sanity_checking:
            set_rng_states(self._before)
