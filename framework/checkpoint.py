"""Checkpoints: written whole or not at all, with the state of every random generator, at optimizer steps only."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from leyden.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder and renames it, so that a crash never leaves half a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
            if os.name == "posix":  # the rename itself must reach the disk; other systems cannot sync a folder
                folder = os.open(file.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


class Checkpoint(ModelCheckpoint):
    """The checkpoint group of the command line: Lightning's ModelCheckpoint, saving at optimizer steps.

    By default every 500 optimizer steps and at the last one, keeping the newest, whether the last is the one planned or
    a limit of time (`--trainer.max_time`) or a callback such as EarlyStopping ended training there. On SIGTERM the
    current step is saved too, unless gradients are still being accumulated: such a checkpoint could not be resumed
    exactly.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = "{step:06d}",
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = False,
    ) -> None:
        triggers = (monitor, every_n_train_steps, every_n_epochs, train_time_interval)
        if all(trigger is None for trigger in triggers):
            every_n_train_steps = 500
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            verbose=verbose,
            save_last=save_last,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            enable_version_counter=enable_version_counter,
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        ends = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if self.monitor is None and (ends or trainer.global_step == trainer.max_steps):
            self._save_now(trainer)
        self._save_if_stopping(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._save_if_stopping(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._save_if_stopping(trainer)

    def _save_if_stopping(self, trainer: Trainer) -> None:
        """Save where a limit of time or a callback has ended training early.

        It happens in the hook in which they ask for it, after them: once training has ended, Lightning counts the
        epoch as a whole one, and a checkpoint of that moment would leave out the rest of its batches on resume.
        """
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        if self.monitor is None and stops and not trainer.fit_loop._should_accumulate():
            self._save_now(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        whole_step = trainer.training and not trainer.fit_loop._should_accumulate()
        if isinstance(exception, SIGTERMException) and self.monitor is None and whole_step:
            self._save_now(trainer)

    def _save_now(self, trainer: Trainer) -> None:
        """Save this step unless it was saved already."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)


class Randomness(Callback):
    """Keeps the random generators of every process in the checkpoint and sets them back on resume.

    They are set as late as possible, when the first batch starts: the sanity check and the loaders draw from them too.
    """

    _KEY = "random_generators"

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [generator_states()]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, states[0])
            states = gathered
        checkpoint[self._KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(self._KEY)
        if states is None or trainer.state.fn != "fit":
            return
        if len(states) != trainer.world_size:
            raise UserError(
                f"the checkpoint was written by {len(states)} processes and this run has {trainer.world_size}; "
                "resume with the same number (--trainer.devices, --trainer.num_nodes)"
            )
        self._restored = states[trainer.global_rank]

    def on_train_batch_start(self, *args: Any) -> None:
        if self._restored is not None:
            set_generator_states(self._restored)
            self._restored = None


def generator_states() -> dict[str, Any]:
    """States of torch's, Python's and NumPy's global generators as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = numpy_state
    states = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: dict[str, Any]) -> None:
    """The inverse of `generator_states`."""
    torch.set_rng_state(states["torch"].cpu())
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
