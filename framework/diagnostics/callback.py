"""Says in a sentence what goes wrong in a run, what to try, and when it was seen; once for each thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from leyden.atomic import write_whole, writing
from leyden.diagnostics.history import History
from leyden.diagnostics.rules import RULES
from leyden.lightning_loop import pending_metrics
from leyden.run.progress import print_line

FILE = "diagnostics.jsonl"
ARGUMENTS = ("entropy_coef", "stop_kl", "value_weight", "value_clip", "samples", "sft_weight")
"""Of algorithms, by their names. An algorithm without one of them has no use for advice about it."""


class Diagnostics(Callback):
    """Watches what a run logs and says what its rules find: on the terminal, and as a line of diagnostics.jsonl in the
    run's folder with `step`, `name`, `value`, `sentence` and `key`, the key of the configuration to try.

    It changes nothing in training. What each rule looks at, and why its bounds are what they are, stands in
    `leyden.diagnostics.rules`; what is said once is not said again, on resume neither.

    Args:
        folder: where the file goes instead of the Trainer's `default_root_dir`.
    """

    _KEY = "diagnostics"

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self.history = History()
        self.said: list[str] = []
        """Names of what was found."""
        self._ears: _Ears | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to what loggers are told: that alone is every measure, and each just once."""
        if trainer.fast_dev_run:
            return
        self._ears = _Ears(lambda step, found: self.take(trainer, pl_module, step, found))
        trainer.loggers = [*trainer.loggers, self._ears]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ears is not None and trainer.is_global_zero:
            self._cut(self._file(trainer), trainer.global_step if trainer.ckpt_path is not None else -1)

    def take(self, trainer: Trainer, module: LightningModule, step: int, found: Mapping[str, float]) -> None:
        """Add what was logged at a step to the history, and look at it."""
        self.history.settings = settings(trainer, module)
        self.history.add(step, found)
        self._look(trainer, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ears is not None:
            self.history.end()
            self._look(trainer, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.loggers = [logger for logger in trainer.loggers if logger is not self._ears]
        self._ears = None

    def _look(self, trainer: Trainer, step: int) -> None:
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

    @staticmethod
    def _cut(file: Path, step: int) -> None:
        """Forget what was found after a step: a run that goes on from a checkpoint finds it again."""
        if not file.is_file():
            return
        lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        with writing(file):
            write_whole(file, "".join(line for line in lines if int(json.loads(line)["step"]) <= step))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """With what this step has measured and no logger was told yet: it is not logged again on resume."""
        whole = History()
        whole.load_state_dict(self.history.state_dict())
        whole.add(trainer.global_step, pending_metrics(trainer))
        checkpoint[self._KEY] = {"history": whole.state_dict(), "said": list(self.said)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._KEY in checkpoint:
            self.history.load_state_dict(checkpoint[self._KEY]["history"])
            self.said = list(checkpoint[self._KEY]["said"])


def settings(trainer: Trainer, module: Any) -> dict[str, Any]:
    """What rules know of an algorithm, by the names of its arguments."""
    found = {name: getattr(module, name) for name in ARGUMENTS if hasattr(module, name)}
    if (price := getattr(module, "kl_controller", None)) is not None:
        found |= {"kl_coef": price.coefficient, "kl_target": price.target}
    if (objective := getattr(module, "objective", None)) is not None:
        found["beta"] = getattr(objective, "beta", None)
    if (sampling := getattr(module, "sampling", None)) is not None:
        found["max_new_tokens"] = sampling.max_new_tokens
    if trainer.optimizers:
        group = trainer.optimizers[0].param_groups[0]
        found["lr"] = float(group.get("initial_lr", group["lr"]))
    return found


class _Ears(Logger):
    """A logger that only hands on what it is told.

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
        """Nothing: they change no measure."""
