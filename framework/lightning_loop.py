"""Where training stands when a hook is called: what only Lightning's loops know, asked in one place."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def accumulating(trainer: Trainer) -> bool:
    """Whether this batch is in the middle of an optimizer step: there are gradients that no checkpoint holds."""
    return bool(trainer.fit_loop._should_accumulate())


def ending(trainer: Trainer) -> bool:
    """Whether this batch is the last one that was planned."""
    last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return bool(last or trainer.global_step == trainer.max_steps)


def stopping(trainer: Trainer) -> bool:
    """Whether training stops here before its planned end: a signal, a limit of time, a callback."""
    return bool(trainer.received_sigterm or (trainer.should_stop and trainer.fit_loop._can_stop_early))


def validates(trainer: Trainer) -> bool:
    """Whether Lightning validates after this batch."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


def measured(trainer: Trainer) -> dict[str, Any]:
    """What the loop that is running has logged, by name; measures of an earlier validation are not among it."""
    return dict(trainer._logger_connector.metrics["callback"])


def measured_by_step(trainer: Trainer) -> dict[str, Any]:
    """What the latest step has logged, by name, also while validation is running."""
    return dict(trainer.fit_loop.epoch_loop._results.metrics(True)["callback"])


def unlogged(trainer: Trainer) -> dict[str, float]:
    """What this step has measured and Lightning will hand to the loggers once the batch, or the epoch, has ended."""
    progress, every = trainer.fit_loop.epoch_loop.batch_progress.current, trainer.log_every_n_steps
    in_step, logs = progress.completed < progress.processed, every and trainer.global_step % every == 0
    if trainer.validating and not in_step or in_step and not (logs or trainer.should_stop):
        return {}
    found = trainer.fit_loop.epoch_loop._results.metrics(in_step)["log"]  # else what the end of an epoch logs
    return {name: float(value) for name, value in found.items()} | ({"epoch": trainer.current_epoch} if found else {})


def skip_rest(trainer: Trainer) -> None:
    """Make this batch the last one of its epoch, as if the others had come: validation and checkpoints depend on it."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    progress.current.increment_by(int(trainer.num_training_batches) - progress.current.ready)
    progress.is_last_batch = True
