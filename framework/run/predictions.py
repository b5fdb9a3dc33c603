"""The output of `leyden predict`: a JSONL file of answers or scores."""

from __future__ import annotations

import json
import math
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from leyden.atomic import write_whole
from leyden.distributed import all_gather
from leyden.errors import UserError
from leyden.language import say


class PredictionWriter(Callback):
    """Writes the answers of `predict` to a JSONL file, one object for each prompt, whole or not at all.

    Args:
        file: of the answers; an older one is replaced.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._batches: list[list[dict[str, Any]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.is_dir():
                raise IsADirectoryError(0, "there is a folder in its place")
            with tempfile.TemporaryFile(dir=self.file.parent):
                pass
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"--output {self.file}: cannot be written ({error.strerror or error}); name another file")

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self._batches.append(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts = all_gather(self._batches)
        # The processes took batches in turn, so taking their answers in turn gives the order of the prompts.
        rows = [row for turn in zip_longest(*parts, fillvalue=[]) for batch in turn for row in batch]
        if trainer.is_global_zero:
            try:
                write_whole(self.file, "".join(json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in rows))
            except OSError as error:  # the disk filled up meanwhile, say
                raise self._unwritable(error) from error
            say(f"{self.file}: {len(rows):,} {'scored rows' if pl_module.predicts == 'scores' else 'answers'}")
        self._batches = []


def as_json(value: Any) -> Any:
    """The nearest value that JSON in UTF-8 can hold: answers must not be lost to an odd value in the row they are for.

    NaN and infinities become null, halves of characters `?`, and what JSON does not know (dates, decimals, bytes) text.
    """
    if isinstance(value, dict):
        return {as_json(str(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value).encode("utf-8", "replace").decode("utf-8")
