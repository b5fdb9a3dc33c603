"""Data modules over files, prepared as a Trainer would, without one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from leyden.datamodules.file_data import FileData

Data = TypeVar("Data", bound=FileData)


def write(path: Path, rows: list[Any]) -> str:
    """Write rows as JSON Lines and return the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(data: Data, folder: Path, stage: str = "fit", predicts: str = "answers", **trainer: Any) -> Data:
    """The data module after `prepare_data` and `setup`; `trainer` overrides what its trainer says."""
    settings = dict(
        predicting=stage == "predict",
        validating=False,
        testing=False,
        default_root_dir=str(folder / "run"),
        global_rank=0,
        world_size=1,
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        limit_val_batches=1.0,
        lightning_module=SimpleNamespace(experience=lambda loader: loader, predicts=predicts),
    )
    data.trainer = SimpleNamespace(**(settings | trainer))  # type: ignore[assignment]
    data.prepare_data()
    data.setup(stage)
    return data
