"""Defaults for optimizers and learning rates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from leyden.errors import UserError


class WarmupCosine(LRScheduler):
    """The learning rate rises linearly over the first steps and falls along half a cosine to the last.

    lr(t) = base * t' / w                                                     for t' = t + 1 <= w = warmup * total
    lr(t) = base * (floor + (1 - floor) * (1 + cos(pi (t - w) / (total - w))) / 2)      after it

    Args:
        optimizer: whose learning rates are scheduled.
        warmup: share of all steps that warm up if below 1, else their number.
        floor: last learning rate as a share of the base.
        total: number of optimizer steps; None lets the algorithm fill it in, and then the rate stays at the base
            after the warm-up if training has no known end.
    """

    def __init__(
        self, optimizer: Optimizer, warmup: float = 0.03, floor: float = 0.0, total: int | None = None
    ) -> None:
        if warmup < 0 or not 0 <= floor <= 1:
            raise UserError(f"WarmupCosine: warmup {warmup} and floor {floor}; give 0 or more, and a share from 0 to 1")
        self.warmup, self.floor, self.total = warmup, floor, total
        self._given = total
        super().__init__(optimizer)

    def plan(self, total: int | None) -> None:
        """Say how many optimizer steps there will be, those already taken included, unless the user did."""
        self.total = self._given if self._given is not None else total
        self.apply()

    def apply(self) -> None:
        """Set the learning rates of the present step."""
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def factor(self, step: int) -> float:
        """The learning rate at a step (from 0) as a share of the base."""
        total = self.total
        rise = self.warmup if self.warmup >= 1 else self.warmup * (total or 0)
        if step + 1 < rise:
            return (step + 1) / rise
        if total is None or total <= rise:
            return 1.0
        done = min(max(step - rise, 0.0) / max(total - rise, 1), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [float(base) * self.factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Only how far it got: the shape is always that of the configuration."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count, "_last_lr": list(self._last_lr)}


def restore_hyperparameters(
    optimizer: Optimizer, settings: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]] | None
) -> None:
    """Put configured learning rates and the like back in the place of those that a checkpoint brought. What is
    configured as it was stays as the checkpoint has it: a schedule may move momenta too.

    Args:
        optimizer: just restored.
        settings: of each parameter group as it was made, without the parameters.
        saved: the plain values of the same when the checkpoint's run began; None where they are not known.
    """
    before = saved if saved is not None and len(saved) == len(settings) else [{}] * len(settings)
    for group, own, old in zip(optimizer.param_groups, settings, before, strict=True):
        plain = plain_state(own)
        group.update({name: value for name, value in own.items() if name not in old or plain[name] != old[name]})


def plain_state(state: Any) -> Any:
    """The numbers, texts and lists of a scheduler's state: what its arguments made of it, and no functions or
    objects."""
    if isinstance(state, Mapping):
        return {str(key): plain_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain_state(value) for value in state]
    return state if isinstance(state, bool | int | float | str) else None


def replayed(make: Callable[[Any], Any], optimizer: Optimizer, steps: int) -> LRScheduler:
    """A new scheduler, stepped as often as training has been: what it is configured as holds from there.

    Args:
        make: the scheduler of an optimizer.
        optimizer: with the configured learning rates.
        steps: that training has taken.
    """
    for group in optimizer.param_groups:  # from which a scheduler would begin
        group.pop("initial_lr", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects a step of the optimizer before each
        scheduler: LRScheduler = make(optimizer)
        for _ in range(steps):
            scheduler.step()
    return scheduler


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices as the optimizer decays them, norms and biases without decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: Iterable[dict[str, Any]] = (
        {"params": [p for p in trained if p.ndim >= 2]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]
