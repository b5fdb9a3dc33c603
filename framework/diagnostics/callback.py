"""The callback that warns of what goes wrong in a run: a sentence with the step and what to try, once per rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from leyden.atomic import truncate_jsonl, writing
from leyden.diagnostics.history import History
from leyden.diagnostics.rules import RULES
from leyden.lightning_loop import pending_metrics
from leyden.run.progress import print_line

FILE = "diagnostics.jsonl"
ARGUMENTS = ("entropy_coef", "stop_kl", "value_weight", "value_clip", "samples", "sft_weight", "lag")
"""Algorithms' arguments that rules read. An algorithm without one of them has no use for advice about it."""


class Diagnostics(Callback):
    """Applies rules to what a run logs and reports their findings: on the terminal, and as a line of diagnostics.jsonl
    in the run's folder with `step`, `name`, `value`, `sentence` and `key`, the configuration key to try.

    It changes nothing in training. `leyden.diagnostics.rules` explains what each rule reads and why its bounds are what
    they are. A rule reports once, also across resumes.

    Args:
        folder: where the file goes instead of the Trainer's `default_root_dir`.
    """

    _KEY = "diagnostics"

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self.history = History()
        self.said: list[str] = []
        """Names of the rules that have reported."""
        self._listener: _MetricsListener | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a logger that listens: loggers get every measure, and each just once."""
        if trainer.fast_dev_run:
            return
        self._listener = _MetricsListener(lambda step, metrics: self.take(trainer, pl_module, step, metrics))
        trainer.loggers = [*trainer.loggers, self._listener]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._listener is not None and trainer.is_global_zero:
            truncate_jsonl(self._file(trainer), trainer.global_step if trainer.ckpt_path is not None else -1)

    def take(self, trainer: Trainer, module: LightningModule, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics logged at a step to the history, and apply the rules."""
        self.history.settings = settings(trainer, module)
        self.history.add(step, metrics)
        self._apply_rules(trainer, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._listener is not None:
            self.history.end()
            self._apply_rules(trainer, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.loggers = [logger for logger in trainer.loggers if logger is not self._listener]
        self._listener = None

    def _apply_rules(self, trainer: Trainer, step: int) -> None:
        for rule in RULES:
            if rule.__name__ in self.said or (finding := rule(self.history)) is None:
                continue
            self.said.append(rule.__name__)
            if trainer.is_global_zero:
                print_line(trainer, f"step {step} · {finding.sentence}")
                line = json.dumps({"step": step, **asdict(finding)}, ensure_ascii=False)
                file = self._file(trainer)
                with writing(file), file.open("a", encoding="utf-8") as stream:
                    stream.write(line + "\n")

    def _file(self, trainer: Trainer) -> Path:
        return Path(self.folder or trainer.default_root_dir) / FILE

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what this step has measured and no logger has got yet: it is not logged again on resume."""
        whole = History()
        whole.load_state_dict(self.history.state_dict())
        whole.add(trainer.global_step, pending_metrics(trainer))
        checkpoint[self._KEY] = {"history": whole.state_dict(), "said": list(self.said)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._KEY in checkpoint:
            self.history.load_state_dict(checkpoint[self._KEY]["history"])
            self.said = list(checkpoint[self._KEY]["said"])


def settings(trainer: Trainer, module: Any) -> dict[str, Any]:
    """The settings of an algorithm for the rules, by the names of its arguments."""
    arguments = {name: getattr(module, name) for name in ARGUMENTS if hasattr(module, name)}
    if (controller := getattr(module, "kl_controller", None)) is not None:
        arguments |= {"kl_coef": controller.coefficient, "kl_target": controller.target}
    if (objective := getattr(module, "objective", None)) is not None:
        arguments["beta"] = getattr(objective, "beta", None)
    if (surrogate := getattr(module, "surrogate", None)) is not None:
        arguments["surrogate"] = type(surrogate).__name__
    active, engine = getattr(module, "active_correction", None), getattr(module, "engine", None)
    if active is not None and engine is not None and not engine.is_exact(module.policy):
        arguments["correction"] = type(active).__name__
    if (sampling := getattr(module, "sampling", None)) is not None:
        arguments["max_new_tokens"] = sampling.max_new_tokens
    if trainer.optimizers:
        group = trainer.optimizers[0].param_groups[0]
        arguments["lr"] = float(group.get("initial_lr", group["lr"]))
    return arguments


class _MetricsListener(Logger):
    """A logger that only passes metrics on.

    Args:
        tell: takes the number of finished optimizer steps and the measures.
    """

    name, version = "diagnostics", ""

    def __init__(self, tell: Callable[[int, Mapping[str, float]], None]) -> None:
        super().__init__()
        self.tell = tell

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.tell((step or 0) + 1, metrics)  # Lightning passes the number of steps finished before this one

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: they change no measure."""
