"""Optimizers and learning-rate schedules that cannot work, refused when they are made: before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from leyden.algorithm.schedules import WarmupCosine
from leyden.errors import UserError, first_line

LENGTHS = ("total_steps", "total_iters", "T_max", "T_0")
"""Attributes of torch's schedules that say over how many steps they go."""


def make_optimizer(make: Callable[[Any], Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer over groups of parameters.

    Raises:
        UserError: it refuses them or its own arguments, or would fail at the first step.
    """
    try:
        optimizer = make(groups)
    except (ValueError, TypeError) as error:
        raise UserError(f"--model.optimizer: {first_line(error)}; change it, or take AdamW") from error
    if isinstance(optimizer, LBFGS | SparseAdam):
        needs = "several losses a step" if isinstance(optimizer, LBFGS) else "sparse gradients"
        raise UserError(f"--model.optimizer {type(optimizer).__name__}: it needs {needs}; take AdamW")
    return optimizer


def make_schedule(make: Callable[[Optimizer], Any], optimizer: Optimizer, total: int | None) -> LRScheduler:
    """The schedule of an optimizer.

    Args:
        total: optimizer steps of the whole training, where it has a known end.

    Raises:
        UserError: it waits for a measure, refuses its arguments, or goes on beyond the end of training: the rate would
            never be what was asked for.
    """
    try:
        schedule: LRScheduler = make(optimizer)
    except (ValueError, TypeError) as error:
        raise UserError(f"--model.lr_scheduler: {first_line(error)}; take WarmupCosine or another class") from error
    name = type(schedule).__name__
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError(f"--model.lr_scheduler {name}: it waits for a measure, which steps have not; take WarmupCosine")
    if total is None:
        return schedule
    if isinstance(schedule, WarmupCosine):
        if schedule.warmup >= 1 and schedule.warmup >= total:
            raise UserError(
                f"--model.lr_scheduler.warmup {schedule.warmup:g}: training has {total} steps, so the rate would never "
                "be reached; give fewer, or a share of all steps such as 0.03"
            )
        return schedule
    for flag in LENGTHS:
        length = getattr(schedule, flag, None)
        if isinstance(length, int | float) and (length > total or (flag == "total_steps" and length < total)):
            raise UserError(
                f"--model.lr_scheduler {name}: {flag} is {length:g} but training has {total} steps; set "
                f"--model.lr_scheduler.{flag} {total}"
            )
    return schedule
