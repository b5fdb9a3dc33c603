"""Run folders: config.yaml, metrics.csv, checkpoints/, export/. Each is claimed before anything expensive happens."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from leyden.errors import UserError

_SHARED = "LEYDEN_RUN"
"""Environment variable with the claimed folder, for the processes that the first one starts."""


def rank() -> int:
    """Global rank of this process as its launcher set it, 0 when there is one process."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


@dataclass
class RunFolder:
    """A claimed run folder."""

    folder: Path
    created: list[Path] = field(default_factory=list)
    """Folders that the claim made, deepest first"""
    lock: int | None = None
    """The open folder, locked for as long as this process writes there; None where it is not locked"""

    def release(self) -> None:
        """Let others write there, and remove the folders that the claim made and that are still empty: a run that never
        started leaves nothing."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None
        for path in [self.folder / "checkpoints", *self.created]:
            with suppress(OSError):
                path.rmdir()


def claim_folder(folder: str | None, name: str, resume: bool, alone: bool = False) -> RunFolder:
    """Claim the folder of a run: the given one, or `runs/<name>-<next free number>`.

    Args:
        folder: the given one.
        name: of a new one.
        resume: whether the folder may hold a run.
        alone: whether no other process may claim it alone at the same time: two would write the same files.

    Raises:
        UserError: the folder holds a run already and this one does not resume it, it cannot be written to, or another
            process trains in it.
    """
    if rank() > 0:
        return RunFolder(Path(folder or os.environ.get(_SHARED, ".")))
    if folder is not None and not resume and _holds_run(Path(folder)):
        raise UserError(
            f"{folder} already holds a run; go on with it by --ckpt_path last (auto, if it has no checkpoint yet), or "
            "name another folder by --trainer.default_root_dir"
        )
    run = _make(Path(folder)) if folder is not None else _make_next(name)
    run.lock = _lock(run.folder) if alone else None
    os.environ[_SHARED] = str(run.folder)
    return run


def _lock(folder: Path, seconds: float = 5.0) -> int | None:
    """Lock a folder. The lock ends with the process, however it ends: one that was just killed has a few seconds."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    handle, until = os.open(folder, os.O_RDONLY), time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(handle)
                raise UserError(
                    f"{folder}: another process trains there; wait for its end, or name another folder by "
                    "--trainer.default_root_dir"
                ) from None
            time.sleep(0.2)
        except OSError:  # some file systems have no locks
            os.close(handle)
            return None


def _make_next(name: str) -> RunFolder:
    """`runs/<name>-<number>` for the first number that is free, also if another run starts at this moment."""
    for number in count(1):
        try:
            return _make(Path("runs", f"{name}-{number}"), exist_ok=False)
        except FileExistsError:
            continue
    raise AssertionError("numbers do not end")


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints"))


def _make(folder: Path, exist_ok: bool = True) -> RunFolder:
    """Create a folder with its parents and make sure that it can be written to."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=exist_ok)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok and folder.parent.is_dir():
            raise
        reason = "there is a file in its place" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(
            f"{folder}: not a folder that can be written to ({reason}); name another by --trainer.default_root_dir"
        ) from error
    return RunFolder(folder, missing)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The differences of two configurations, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        changes = [differences(old.get(k), new.get(k), path if k == "init_args" else f"{path}.{k}") for k in keys]
        return [line for lines in changes for line in lines]
    return [] if old == new else [f"{path.lstrip('.')}: {old} -> {new}"]


def flattened(config: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """A resolved config.yaml as flags."""
    flags = dict[str, str]()
    for key, value in config.items():
        inner = path if key in ("init_args", "class_path") else f"{path}.{key}".lstrip(".")
        if isinstance(value, dict) and value:
            flags |= flattened(value, inner)
        else:
            flags[inner] = _text(value)
    return flags


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def changed_settings(folder: Path, config: str) -> list[str]:
    """The settings that a resumed run changes against the config.yaml in its folder, as `key: old -> new`."""
    file = folder / "config.yaml"
    if not file.is_file():
        return []
    return differences(yaml.safe_load(file.read_text(encoding="utf-8")), yaml.safe_load(config))


def revision() -> str | None:
    """The git commit of the current folder, marked where files differ from it; None where there is none."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
