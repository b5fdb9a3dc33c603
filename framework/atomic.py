"""Checkpoint files: written whole or not at all, read only where they are sound and ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from leyden.checkpoint.find import load
from leyden.run.folder import sync_folder, writing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder and renames it, so that a crash never leaves half a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        file = Path(path)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as stream:
                    torch.save(checkpoint, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, file)
                sync_folder(file.parent)  # the rename itself must reach the disk
            finally:
                temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return load(Path(path), lambda: super(AtomicCheckpointIO, self).load_checkpoint(path, *args, **kwargs))
