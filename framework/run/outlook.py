"""What a run will take, said early in it, so that nothing is a surprise after hours."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from leyden.run.callbacks import peak_memory_gb
from leyden.run.progress import Progress, clock, total_steps


class Outlook(Callback):
    """Says once how much memory the run has needed, how fast it is and how long it will go on.

    The longest micro-batch comes first and optimizers make their state at the first step, so the memory of two steps is
    that of the run, except for algorithms that sample: they are looked at when their first rollout is learnt from.

    Args:
        after: seconds of training to wait for, so that the speed is that of more than two steps.
        steps: optimizer steps that are enough, however short they were.
    """

    def __init__(self, after: float = 20.0, steps: int = 20) -> None:
        self.after, self.steps = after, steps
        self._began, self._first, self._said = 0.0, 0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._first, self._said = time.monotonic(), trainer.global_step, False

    def pause(self, seconds: float) -> None:
        """So long something was done that is no part of training."""
        self._began += seconds

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        done, took = trainer.global_step - self._first, time.monotonic() - self._began
        if self._said or not trainer.is_global_zero or done < 2 or trainer.fit_loop._should_accumulate():
            return
        samples = getattr(pl_module, "experiences", None) is not None
        if trainer.is_last_batch if samples else took >= self.after or done >= self.steps:
            self._said = True
            self._say(trainer, pl_module, took / done)

    def _say(self, trainer: Trainer, pl_module: LightningModule, seconds: float) -> None:
        total, speed = total_steps(trainer), trainer.callback_metrics.get("perf/tokens_per_second")
        parts = [f"{peak_memory_gb(pl_module.device):.2f} GB at most so far"]
        parts += [f"{float(speed):,.0f} tokens/s"] if speed is not None else []
        if total is not None and total > trainer.global_step:
            parts.append(f"about {clock(seconds * (total - trainer.global_step))} left")
        text = f"step {trainer.global_step} · " + " · ".join(parts)
        shown = trainer.progress_bar_callback
        if isinstance(shown, Progress):
            shown.print(text)
        elif shown is not None:
            print(text, file=sys.stderr)
