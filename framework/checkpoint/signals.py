"""Signals that end a run: it stops at the next whole optimizer step, once that is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from leyden.lightning_loop import is_accumulating


class GracefulStop(Callback):
    """SIGTERM, Ctrl-C and the signal by which SLURM asks to be put in the queue again end training after the optimizer
    step that is under way, on all processes if it reaches one. A second one ends the process at once.

    Lightning's own handlers save wherever a step happens to be, and in the middle of one there is nothing to go on
    from. While a rollout is sampled there is no step under way, so it is finished first, and one step with it.
    """

    def __init__(self) -> None:
        self._asked: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take Lightning's place; it puts back what was there before it when training is over."""
        if threading.current_thread() is not threading.main_thread():
            return
        environment: Any = trainer._accelerator_connector.cluster_environment
        requeue = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        signals = [signal.SIGTERM, signal.SIGINT, *([environment.requeue_signal] if requeue else ())]

        def handle(number: int, frame: Any) -> None:
            if self._asked is not None:
                self._leave(trainer, number)
            self._asked = number
            if trainer.is_global_zero:
                name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
                os.write(2, f"{name}: stopping once this step is saved; a second one stops at once\n".encode())

        for number in signals:
            signal.signal(number, handle)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not is_accumulating(trainer):
            self._tell(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        """Let Lightning know, on every process at the same step: then it ends training by itself after this hook."""
        asked = self._asked is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            trainer._signal_connector.received_sigterm = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + (self._asked or signal.SIGTERM)  # what a shell says of a process ended by a signal
            if self._asked not in (None, signal.SIGTERM, signal.SIGINT) and trainer.is_global_zero:
                _requeue()

    @staticmethod
    def _leave(trainer: Trainer, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if trainer.strategy.launcher is not None:  # the processes that this one started
            trainer.strategy.launcher.kill(signal.SIGKILL)
        os._exit(128 + number)


def _requeue() -> None:
    """Ask SLURM to put this job in the queue again, as Lightning does."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_JOB_ID"]
    name = job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", name], check=False)
