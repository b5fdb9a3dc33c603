"""Measures that callbacks watch: that each is measured at all, seen as early as that can be told.

Held-out measures are known after the validation before the first step, those of steps after the first step. A name that
neither this project nor a step knows may be logged by a callback of the user's, and is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from leyden.errors import UserError, nearest
from leyden.lightning_loop import is_accumulating, logged_metrics, step_metrics

HELD_OUT = ("val", "eval")
OF_STEPS = ("train", "perf", "policy", "rollout", "ppo", "objective")


def family(monitor: str) -> str:
    """`val` of val/loss, and of val_loss as Lightning's examples write it."""
    return re.split(r"[/_]", monitor)[0]


def check_held_out(trainer: Trainer, where: str, monitor: str) -> None:
    """That there is anything to measure this on, once loaders are made.

    Raises:
        UserError: it is a measure of held-out rows or of an evaluation, and there is none.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if family(monitor) not in HELD_OUT:
        return
    ours = type(trainer.lightning_module).__module__.startswith("leyden.")  # the user's may log eval/… itself
    evaluated = any(hasattr(callback, "evaluate") for callback in _callbacks(trainer))
    if family(monitor) == "eval" and ours and not evaluated:
        raise UserError(f"{where} {monitor}: nothing is evaluated; add --eval.path FILE, or watch val/loss")
    if not trainer.enable_validation or (loop._combined_loader is not None and loop.skip):
        raise UserError(
            f"{where} {monitor}: no rows are held out, so it will never be measured; hold some out, or watch train/loss"
        )


def check_measured(where: str, monitor: str, names: Iterable[str]) -> None:
    """That a measure is among those that were just logged. Raises `UserError` with their names."""
    known = sorted(names)
    if monitor not in known:
        listed = ", ".join(known) or "nothing"
        raise UserError(f"{where} {monitor}: no such measure{nearest(monitor, known)} (logged: {listed})")


class Monitors(Callback):
    """Stops a run at its start, and not after hours, if a callback such as EarlyStopping watches what is never
    measured."""

    def __init__(self) -> None:
        self._stepped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepped = False
        for where, monitor in _watched(trainer):
            check_held_out(trainer, where, monitor)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        for where, monitor in _watched(trainer):
            if family(monitor) == "val" or (family(monitor) == "eval" and not trainer.sanity_checking):
                check_measured(where, monitor, logged_metrics(trainer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._stepped or is_accumulating(trainer):
            return
        self._stepped = True
        for where, monitor in _watched(trainer):
            if family(monitor) in OF_STEPS:
                check_measured(where, monitor, step_metrics(trainer))


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _watched(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Who watches what. The command line's own checkpoints are named by their flag."""
    for callback in _callbacks(trainer):
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str):
            own = type(callback).__module__.startswith("leyden.")
            yield "--checkpoint.monitor" if own else f"{type(callback).__name__} monitor", monitor
