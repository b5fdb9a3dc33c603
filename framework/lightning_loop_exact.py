"""Lightning's training loop, made to go on exactly where a checkpoint was taken."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _Progress


def exact(trainer: Trainer) -> None:
    """Give a trainer this loop."""
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
            _set(self.epoch_progress, part, finished, finished if ended else finished + 1)
        _set(batch, "total", batch.total.processed)
        _set(batch, "current", done)
        batch.is_last_batch = False
        loop.val_loop.batch_progress.current.reset()
        if ended:  # these count within an epoch
            loop.val_loop.batch_progress.total.reset()
            loop.scheduler_progress.reset_on_run()
            loop.automatic_optimization.optim_progress.reset_on_run()

    @property
    def skip(self) -> bool:
        return bool(super().skip and not (self.restarting and self.max_batches))


def _set(progress: _Progress, part: str, completed: int, started: int | None = None) -> None:
    """Make a counter say that so many have been completed, and so many started."""
    started = completed if started is None else started
    values = {"ready": started, "started": started, "processed": completed, "completed": completed}
    getattr(progress, part).__dict__.update(values)
