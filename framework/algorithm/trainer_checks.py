"""Options and callbacks of the Trainer that would break exact steps, change nothing, or fail in the middle of a run:
refused before the model is built."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)

from leyden.errors import UserError

REFUSED: dict[type[Callback], str] = {
    GradientAccumulationScheduler: (
        "steps are planned ahead, and their means would become sums; set --trainer.accumulate_grad_batches"
    ),
    BatchSizeFinder: (
        "--data.batch_size decides what a step is, and a micro-batch that does not fit the memory is cut by itself; "
        "leave it out"
    ),
    LearningRateFinder: "it looks for an attribute `lr`; try values of --model.optimizer.lr in short runs",
    StochasticWeightAveraging: (
        "it copies the model before it has weights, and averages nothing; take EMAWeightAveraging"
    ),
    BackboneFinetuning: "it looks for an attribute `backbone`; train a share of the weights by --config lora",
    ModelPruning: "it looks for weights before the model has any; prune the exported model",
    OnExceptionCheckpoint: (
        "it saves in the middle of a step, where nothing can go on from; set --checkpoint.every_n_train_steps"
    ),
}
"""Callback of Lightning's -> why it cannot work here, and what to do instead."""


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Refuse callbacks that cannot work. Raises `UserError`."""
    for callback in callbacks:
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise UserError(f"--trainer.callbacks {type(callback).__name__}: {reason}")


def check_trainer(trainer: Trainer, module: Any) -> None:
    """Check what a Trainer that is about to fit was given.

    Args:
        trainer: with the DataModule set up.
        module: the algorithm.

    Raises:
        UserError: an option or a callback that cannot work.
    """
    check_callbacks(trainer.callbacks)  # type: ignore[attr-defined]
    for flag, reason in _wrong_options(trainer, module).items():
        value = getattr(trainer, flag)
        value = getattr(value, "value", value)  # of an enumeration
        raise UserError(f"--trainer.{flag} {value}: {reason}")
    if 0 in (module.total_steps(), module.steps_per_epoch, trainer.limit_train_batches):
        raise UserError(
            "no step would be taken: --trainer.max_steps, --trainer.max_epochs and --trainer.limit_train_batches leave "
            "none; give more, or measure by leyden validate"
        )


def _wrong_options(trainer: Trainer, module: Any) -> dict[str, str]:
    """Option -> what is wrong with its value and what to do."""
    wrong, epoch = {}, module.steps_per_epoch
    clip, interval, every = trainer.gradient_clip_val, trainer.val_check_interval, trainer.check_val_every_n_epoch
    if clip is not None and clip < 0:
        wrong["gradient_clip_val"] = "a norm is not negative; give 0 to clip nothing"
    if clip is None and trainer.gradient_clip_algorithm is not None:
        wrong["gradient_clip_algorithm"] = "it does nothing alone; add --trainer.gradient_clip_val 1"
    if trainer.log_every_n_steps < 1:
        wrong["log_every_n_steps"] = "metrics.csv would stay empty; give 1 or more"
    if module.on_policy and not trainer.fast_dev_run and trainer.limit_train_batches not in (0, 1.0):
        wrong["limit_train_batches"] = (
            "an epoch is one rollout, and the rest of it would be thrown away; draw fewer prompts by --data.batch_size"
        )
    if trainer.reload_dataloaders_every_n_epochs:
        wrong["reload_dataloaders_every_n_epochs"] = "every epoch would begin anew with the order of the first; give 0"
    if every is not None and every < 1:
        wrong["check_val_every_n_epoch"] = "give 1 or more; --trainer.limit_val_batches 0 turns validation off"
    if not interval:
        wrong["val_check_interval"] = "give 1 or more; --trainer.limit_val_batches 0 turns validation off"
    elif isinstance(interval, int) and every is not None and epoch is not None:
        if interval > (batches := epoch * trainer.accumulate_grad_batches):
            wrong["val_check_interval"] = (
                f"an epoch has {batches} micro-batches; add --trainer.check_val_every_n_epoch null to count them over "
                "epochs, or give fewer"
            )
    return wrong
