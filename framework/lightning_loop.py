"""Lightning's loops: questions that only their inner state answers, and the loop that resumes exactly.

First what only they know when a hook is called: where training stands, what was logged. Then the loop that goes on
exactly where a checkpoint was taken.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _Progress


def is_accumulating(trainer: Trainer) -> bool:
    """Whether this batch is in the middle of an optimizer step: there are gradients that no checkpoint holds."""
    return bool(trainer.fit_loop._should_accumulate())


def is_last_planned_step(trainer: Trainer) -> bool:
    """Whether this batch is the last one that was planned."""
    last = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return bool(last or trainer.global_step == trainer.max_steps)


def planned_steps(trainer: Trainer, per_epoch: int | None) -> int | None:
    """Optimizer steps at which training ends: those already taken, and those that are still to come as it is planned
    now. To be asked between two steps; None where neither steps nor epochs bound it.

    Args:
        per_epoch: optimizer steps of an epoch; None where nothing is planned ahead.
    """
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and per_epoch is not None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed // trainer.accumulate_grad_batches
        left = max((trainer.max_epochs - trainer.current_epoch) * per_epoch - done, 0)
        ends.append(trainer.global_step + left)
    return min(ends) if ends else None


def is_stopping_early(trainer: Trainer) -> bool:
    """Whether training stops here before its planned end: a signal, a limit of time, a callback."""
    return bool(trainer.received_sigterm or (trainer.should_stop and trainer.fit_loop._can_stop_early))


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates after this batch."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


def logged_metrics(trainer: Trainer) -> dict[str, Any]:
    """What the loop that is running has logged, by name; measures of an earlier validation are not among it."""
    return dict(trainer._logger_connector.metrics["callback"])


def step_metrics(trainer: Trainer) -> dict[str, Any]:
    """What the latest step has logged, by name, also while validation is running."""
    return dict(trainer.fit_loop.epoch_loop._results.metrics(True)["callback"])


def pending_metrics(trainer: Trainer) -> dict[str, float]:
    """What this step has measured and Lightning will hand to the loggers once the batch, or the epoch, has ended."""
    progress, every = trainer.fit_loop.epoch_loop.batch_progress.current, trainer.log_every_n_steps
    in_step, logs = progress.completed < progress.processed, every and trainer.global_step % every == 0
    if trainer.validating and not in_step or in_step and not (logs or trainer.should_stop):
        return {}
    pending = trainer.fit_loop.epoch_loop._results.metrics(in_step)["log"]  # else what the end of an epoch logs
    epoch = {"epoch": trainer.current_epoch} if pending else {}
    return {name: float(value) for name, value in pending.items()} | epoch


def skip_rest_of_epoch(trainer: Trainer) -> None:
    """Make this batch the last one of its epoch, as if the others had come: validation and checkpoints depend on it."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    progress.current.increment_by(int(trainer.num_training_batches) - progress.current.ready)
    progress.is_last_batch = True


def use_exact_loop(trainer: Trainer) -> None:
    """Give a trainer the loop below."""
    trainer.fit_loop.__class__ = ExactLoop


class ExactLoop(_FitLoop):
    """Lightning tells from its counters at which hook a checkpoint was taken, and goes on from each in another way.
    Some of these lose the loader's state (after a second restart, and from the end of an epoch, where epochs bound
    training) or count an epoch twice. Here the counters are brought to what they are between two batches.

    What is resumed after its last step still comes to its end: validation and export are left to do.
    """

    restarting = _Loop.restarting  # Lightning's own takes it back at the end of an epoch

    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        super().load_state_dict(state_dict, prefix)
        loop, epoch = self.epoch_loop, self.epoch_progress.current
        batch, ended = loop.batch_progress, loop.batch_progress.is_last_batch
        closed = epoch.completed == epoch.ready  # also an epoch that training ended in the middle of
        finished, done = epoch.completed + ended - closed, 0 if ended else batch.current.processed
        for part in ("total", "current"):
            _set_counter(self.epoch_progress, part, finished, finished if ended else finished + 1)
        _set_counter(batch, "total", batch.total.processed)
        _set_counter(batch, "current", done)
        batch.is_last_batch = False
        loop.val_loop.batch_progress.current.reset()
        if ended:  # these count within an epoch
            loop.val_loop.batch_progress.total.reset()
            loop.scheduler_progress.reset_on_run()
            loop.automatic_optimization.optim_progress.reset_on_run()

    @property
    def skip(self) -> bool:
        return bool(super().skip and not (self.restarting and self.max_batches))


def _set_counter(progress: _Progress, part: str, completed: int, started: int | None = None) -> None:
    """Make a counter say that so many have been completed, and so many started."""
    started = completed if started is None else started
    values = {"ready": started, "started": started, "processed": completed, "completed": completed}
    getattr(progress, part).__dict__.update(values)
