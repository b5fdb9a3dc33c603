"""A run's terminal output: the model's size, then a progress line, redrawn on a terminal, repeated in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.cells import cell_len
from torch import Tensor, nn
from torch.optim import Optimizer

from leyden.language import localised, say
from leyden.lightning_loop import is_accumulating, planned_steps
from leyden.run.callbacks import peak_memory_gb

_HELD_OUT = ("val/", "test/", "eval/")
_INTERVALS = ("_se", "_low", "_high")
"""Endings of the measures that are intervals of others: they are in metrics.csv, but not in a progress line."""


class Progress(ProgressBar):
    """The progress line with step, loss, speed and time left: redrawn on a terminal, repeated at times in a log file.

    Args:
        every: seconds between two progress lines in a log file.
    """

    def __init__(self, every: float = 30.0) -> None:
        super().__init__()
        self.every = every
        self._enabled, self._last_shown, self._width = True, 0.0, 0
        self._start: tuple[float, int] = (0.0, 0)
        self._total: int | None = None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a separate line above the progress line."""
        if self._enabled:
            self._write(" ".join(map(str, args)), last=True)

    def _write(self, text: str, last: bool) -> None:
        text = localised(text)
        if not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)
            return
        width = cell_len(text)  # a Korean letter takes two
        print(f"\r{text}{' ' * (self._width - width)}", end="\n" if last else "", file=sys.stderr, flush=True)
        self._width = 0 if last else width

    def say(self, text: str) -> None:
        """Show a text as the progress line, no more often than the line is repeated."""
        now = time.monotonic()
        if self._enabled and now - self._last_shown >= (0.2 if sys.stderr.isatty() else self.every):
            self._last_shown = now
            self._write(text, last=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._last_shown = (time.monotonic(), trainer.global_step), 0.0
        self._total = total_steps(trainer)

    def pause(self, seconds: float) -> None:
        """Leave seconds out of the speed and the time left, such as those of an evaluation pass."""
        self._start = (self._start[0] + seconds, self._start[1])

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        now = time.monotonic()
        if (
            self._enabled
            and trainer.global_step > self._start[1]
            and (now - self._last_shown >= (0.2 if sys.stderr.isatty() else self.every))
        ):
            self._last_shown = now
            self._write(self._line(trainer, now, self._total), last=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled:
            self._write(self._line(trainer, time.monotonic(), self._total), last=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not sys.stderr.isatty():
            self._last_shown = time.monotonic()  # in a log file only what takes long is worth a line

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self.say(f"validation · {batch_idx + 1:,}/{batches[dataloader_idx]:,} batches")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(_HELD_OUT)}
        if not self._enabled or (trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")):
            return  # a few batches are no measure
        if trainer.state.fn == "fit":
            self.show_metrics(trainer, metrics)
        else:  # the output of `validate` and `test`
            print("\n".join(f"{k} {v:.4g}" for k, v in metrics.items()))

    on_test_end = on_validation_end

    def show_metrics(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Print the metrics of held-out rows on a separate line."""
        parts = [f"{name} {value:.4g}" for name, value in metrics.items() if not name.endswith(_INTERVALS)]
        self.print(f"step {trainer.global_step} · " + " · ".join(parts))

    def _line(self, trainer: Trainer, now: float, total: int | None) -> str:
        step = trainer.global_step
        parts = [f"step {step}" + (f"/{total}" if total else "")]
        metrics = trainer.callback_metrics
        if "train/loss" in metrics:
            parts.append(f"loss {float(metrics['train/loss']):.4f}")
        if "rollout/reward" in metrics:
            parts.append(f"reward {float(metrics['rollout/reward']):.3f}")
        if "perf/tokens_per_second" in metrics:
            parts.append(f"{float(metrics['perf/tokens_per_second']):,.0f} tokens/s")
        began, first = self._start
        if step > first and (left := seconds_left(trainer, (now - began) / (step - first), total)) is not None:
            parts.append(f"{clock(left)} left")
        return " · ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: `1:02:03`."""
    left = int(seconds)
    return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


def seconds_left(trainer: Trainer, per_step: float, total: int | None) -> float | None:
    """Seconds until training ends by its steps or by `--trainer.max_time`; None where neither bounds it."""
    ends = [per_step * (total - trainer.global_step)] if total is not None else []
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    ends += [max(left, 0.0) for timer in timers if (left := timer.time_remaining()) is not None]
    return min(ends) if ends else None


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps at which training ends, as it starts or goes on; None where neither steps nor epochs bound it."""
    batches = trainer.num_training_batches
    known = batches != float("inf")
    return planned_steps(trainer, -(-int(batches) // trainer.accumulate_grad_batches) if known else None)


class RunEstimate(Callback):
    """Prints once how much memory the run has needed, how fast it is and how long it will go on.

    The longest micro-batch comes first and optimizers make their state at the first step, so the memory of two steps is
    that of the run. Of algorithms that sample it is not: there the line comes after training on the first rollout.

    Args:
        after: seconds of training to wait for, so that the speed is that of more than two steps.
        steps: optimizer steps that are enough, however short they were.
    """

    def __init__(self, after: float = 20.0, steps: int = 20) -> None:
        self.after, self.steps = after, steps
        self._began, self._first, self._printed = 0.0, 0, False
        self._total: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._first, self._printed = time.monotonic(), trainer.global_step, False
        self._total = total_steps(trainer)

    def pause(self, seconds: float) -> None:
        """Leave seconds out of the speed, such as those of an evaluation pass."""
        self._began += seconds

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        done, elapsed = trainer.global_step - self._first, time.monotonic() - self._began
        if self._printed or not trainer.is_global_zero or done < 2 or is_accumulating(trainer):
            return
        samples = pl_module.on_policy
        if trainer.is_last_batch if samples else elapsed >= self.after or done >= self.steps:
            self._printed = True
            self._print(trainer, pl_module, elapsed / done)

    def _print(self, trainer: Trainer, pl_module: LightningModule, seconds: float) -> None:
        total, speed = self._total, trainer.callback_metrics.get("perf/tokens_per_second")
        parts = [f"{peak_memory_gb(pl_module.device):.2f} GB at most so far"]
        parts += [f"{float(speed):,.0f} tokens/s"] if speed is not None else []
        left, step = seconds_left(trainer, seconds, total), trainer.global_step
        if left is not None and (total is None or total > step):
            parts.append(f"about {clock(left)} left")
        if left is not None and total is not None and step + left / seconds < total - 1:
            parts.append(
                f"--trainer.max_time ends it near step {step + int(left / seconds):,} of {total:,}, before the "
                "learning rate has come down"
            )
        if trainer.progress_bar_callback is not None:
            print_line(trainer, f"step {step} · " + " · ".join(parts))


class Summary(Callback):
    """Prints once how many parameters the model has, their bytes, and how many are trained, and at what rate."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            say(summarise(pl_module), file=sys.stderr)
            if trainer.ckpt_path is None:
                self._say_rates(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.ckpt_path is not None:  # the steps already taken are known by now
            self._say_rates(trainer)

    def _say_rates(self, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            say(_rate(trainer, optimizer), file=sys.stderr)


def _rate(trainer: Trainer, optimizer: Optimizer) -> str:
    """`AdamW at learning rate 2e-05, WarmupCosine, 3 steps`: the rate that is scheduled."""
    rates = sorted({float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups})
    parts = [f"{type(optimizer).__name__} at learning rate {', '.join(f'{rate:g}' for rate in rates)}"]
    parts += [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    total = trainer.lightning_module.total_steps()
    return ", ".join(parts + ([] if total is None else [f"{total:,} steps"]))


def summarise(module: nn.Module) -> str:
    """`3,400,000 parameters (13.6 MB), 12,288 trained (0.36 %)`. Quantised weights count unpacked, in the bytes that
    they and their scales take."""
    total = trained = size = 0
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trained += count if parameter.requires_grad else 0
        size += parameter.numel() * parameter.element_size() + _scales(state)
    share = f"{100 * trained / total:.3g} %" if total else "nothing"
    return f"{total:,} parameters ({size / 1e6:,.1f} MB), {trained:,} trained ({share})"


def _scales(state: Any) -> int:
    """Bytes of the tensors that a quantised weight is unpacked with; quantised scales have scales of their own."""
    if state is None:
        return 0
    parts = [x for x in vars(state).values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in parts) + _scales(getattr(state, "state2", None))


def progress_of(trainer: Trainer) -> Progress | None:
    """The progress line of a run; None where it has none or another process shows it."""
    bar = trainer.progress_bar_callback
    return bar if isinstance(bar, Progress) and trainer.is_global_zero else None


def print_line(trainer: Trainer, text: str) -> None:
    """Print a line, above the progress line where there is one."""
    if (progress := progress_of(trainer)) is not None:
        progress.print(text)
    else:
        say(text, file=sys.stderr)


class RolloutBar:
    """The progress of a rollout, shown as the run's progress line.

    Args:
        trainer: whose progress line it is shown as.
        rollout: its number, from 0.
        total: responses of this process.
    """

    def __init__(self, trainer: Trainer, rollout: int, total: int) -> None:
        self.progress, self.rollout, self.total, self.done = progress_of(trainer), rollout, total, 0

    def add(self, responses: int) -> None:
        """Count `responses` more as sampled."""
        self.done += responses
        if self.progress is not None:
            self.progress.say(f"rollout {self.rollout + 1} · {min(self.done, self.total):,}/{self.total:,} responses")

    def scored(self, responses: int) -> None:
        """Set the count to the responses that are sampled and scored."""
        self.done = responses


def count_answers(trainer: Trainer, total: int) -> Callable[[int], None]:
    """A function that counts this process's answers in an evaluation pass and shows their number as the progress line.

    Args:
        trainer: whose progress line it is shown as.
        total: answers of this process.

    Returns:
        a function that takes how many more prompts have been answered.
    """
    progress, done = progress_of(trainer), [0]

    def add(count: int) -> None:
        done[0] += count
        if progress is not None:
            progress.say(f"evaluation · {done[0]:,}/{total:,} answers")

    return add
