"""What a run shows and leaves behind. The command line adds all of these; one given in the config takes its place."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import nn

from leyden.errors import UserError
from leyden.logger import MetricsCSV
from leyden.run import changed_settings, write_whole


class Progress(ProgressBar):
    """One line that tells step, loss, speed and time left: redrawn on a terminal, repeated every while in a log file.

    Args:
        every: seconds between two lines in a log file.
    """

    def __init__(self, every: float = 30.0) -> None:
        super().__init__()
        self.every = every
        self._enabled, self._shown, self._width = True, 0.0, 0
        self._start: tuple[float, int] = (0.0, 0)

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line of its own, above the redrawn one."""
        if self._enabled:
            self._write(" ".join(map(str, args)), last=True)

    def _write(self, text: str, last: bool) -> None:
        if not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)
            return
        print(f"\r{text:<{self._width}}", end="\n" if last else "", file=sys.stderr, flush=True)
        self._width = 0 if last else len(text)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._shown = (time.monotonic(), trainer.global_step), 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        now, total = time.monotonic(), total_steps(trainer)
        if self._enabled and (now - self._shown >= (0.2 if sys.stderr.isatty() else self.every)):
            self._shown = now
            self._write(self._line(trainer, now, total), last=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled:
            self._write(self._line(trainer, time.monotonic(), total_steps(trainer)), last=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and not trainer.sanity_checking and trainer.state.fn == "fit":
            shown = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val/", "eval/"))}
            self.print(f"step {trainer.global_step} · " + " · ".join(f"{k} {v:.4g}" for k, v in shown.items()))

    def _line(self, trainer: Trainer, now: float, total: int | None) -> str:
        step = trainer.global_step
        parts = [f"step {step}" + (f"/{total}" if total else "")]
        metrics = trainer.callback_metrics
        if "train/loss" in metrics:
            parts.append(f"loss {float(metrics['train/loss']):.4f}")
        if "perf/tokens_per_second" in metrics:
            parts.append(f"{float(metrics['perf/tokens_per_second']):,.0f} tokens/s")
        began, first = self._start
        if total and step > first:
            left = int((now - began) / (step - first) * (total - step))
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return " · ".join(parts)


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps at which training ends, None where neither steps nor epochs bound it."""
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs >= 0 and batches != float("inf"):
        ends.append(epochs * -(-int(batches) // trainer.accumulate_grad_batches))
    return min(ends) if ends else None


class Summary(Callback):
    """Says once how many parameters the model has, how many are trained, and the bytes of both."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(summarise(pl_module), file=sys.stderr)


def summarise(module: nn.Module) -> str:
    """`3,400,000 parameters (13.6 MB), 12,288 trained (0.36 %)`. Quantised weights count unpacked, in packed bytes."""
    total = trained = size = 0
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trained += count if parameter.requires_grad else 0
        size += parameter.numel() * parameter.element_size()
    share = f"{100 * trained / total:.3g} %" if total else "nothing"
    return f"{total:,} parameters ({size / 1e6:,.1f} MB), {trained:,} trained ({share})"


class Throughput(Callback):
    """Logs `perf/tokens_per_second` (real tokens of all processes, over the last steps, pauses for validation left
    out), `perf/peak_memory_gb` (10^9 bytes: on a GPU what tensors held, else the process) and `train/seconds`.

    Args:
        window: optimizer steps that the speed is averaged over.
    """

    def __init__(self, window: int = 20) -> None:
        self.seconds = 0.0
        self._last: tuple[float, float] | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=window)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = float(state_dict["seconds"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._last is None:
            self._last = (time.monotonic(), pl_module.progress["tokens"])

    def on_validation_start(self, *args: Any) -> None:
        self._last = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._last is None or trainer.fit_loop._should_accumulate():
            return
        now, tokens = time.monotonic(), pl_module.progress["tokens"]
        took = now - self._last[0]
        self._recent.append((took, tokens - self._last[1]))
        self._last = (now, tokens)
        self.seconds += took
        speed = sum(t for _, t in self._recent) / max(sum(s for s, _ in self._recent), 1e-9)
        pl_module.log("perf/tokens_per_second", speed, on_step=True, on_epoch=False)
        pl_module.log("perf/peak_memory_gb", peak_memory_gb(pl_module.device), on_step=True, on_epoch=False)
        pl_module.log("train/seconds", self.seconds, on_step=True, on_epoch=False)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far in 10^9 bytes: of tensors on a GPU, else of this process; 0.0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


class RunRecord(Callback):
    """Writes the resolved config.yaml once training really starts. On resume it says what changed and cuts metrics.csv.

    Args:
        folder: the run's folder.
        config: the resolved configuration as YAML.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if trainer.ckpt_path is not None:
            print(f"resuming {self.folder} at step {trainer.global_step}", file=sys.stderr)
            for line in changed_settings(self.folder, self.config):
                print(f"  changed: {line}", file=sys.stderr)
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.cut(trainer.global_step)
        write_whole(self.folder / "config.yaml", self.config)


class Export(Callback):
    """Saves the policy when training ends, as a folder that transformers (and PEFT, for an adapter) load by themselves.

    Args:
        folder: where; an older export there is replaced.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
        try:
            pl_module.policy.save(temporary)
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(temporary, self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        print(f"exported to {self.folder}")


class PredictionWriter(Callback):
    """Writes what `predict` answers to a JSONL file, one object a prompt, whole or not at all.

    Args:
        file: where; an older file there is replaced.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._rows: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.is_dir():
                raise IsADirectoryError(0, "there is a folder in its place")
        except OSError as error:
            raise UserError(f"--output {self.file}: cannot be written ({error.strerror}); name another file") from error

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self._rows += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = self._rows
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        if trainer.is_global_zero:
            write_whole(self.file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            print(f"{len(rows)} answers in {self.file}")
        self._rows = []
