"""Checkpoint files: finding the one to resume from, checking that it is sound and ours, writing and reading."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from leyden import __version__
from leyden.atomic import is_whole, replacing, writing
from leyden.errors import UserError, nearest

log = logging.getLogger("leyden")

ENTRY = "leyden"
"""Key of what a checkpoint says of itself: version, format, when it was saved, and what it was made from."""
FORMAT = 2
"""Counted up when the meaning of what a checkpoint holds changes, so that others are refused and not misread."""


def find_checkpoint(
    value: str, folder: str | None, dirpath: str | None = None, flag: str = "--ckpt_path"
) -> Path | None:
    """The checkpoint that `--ckpt_path` means: a path; `last`, the newest whole one of the run; `auto`, which is the
    same where there is one and otherwise None, a start; or `best`, by what `--checkpoint.monitor` measures.

    The newest is the one that was saved last by its own account: files may have been copied or touched since.

    Args:
        value: what was typed.
        folder: of the run, if it is known.
        dirpath: where checkpoints are kept instead of in the run's folder.
        flag: that it was typed after, for messages.

    Raises:
        UserError: there is none.
    """
    if value not in ("last", "auto", "best"):
        return _given(value, flag)
    if folder is None and dirpath is None:
        runs = sorted(str(path.parent.parent) for path in Path("runs").glob("*/checkpoints/*.ckpt"))
        hint = f" (such as {runs[-1]})" if runs else ""
        raise UserError(f"{flag} {value}: of which run? Add --trainer.default_root_dir FOLDER{hint}")
    place = Path(dirpath or Path(str(folder), "checkpoints"))
    damaged: list[tuple[Path, str]] = []
    there = [file for file in place.glob("*.ckpt") if file.exists()]  # a link may point at a file that is gone
    for file in sorted(there, key=_age, reverse=True):
        if (problem := damage(file)) is None:
            for other, why in damaged:
                log.info("%s is passed over: %s", other, why)
            return _best(file, f"{flag} best") if value == "best" else file
        damaged.append((file, problem))
    if value == "auto" and not damaged:
        return None
    cut = f" that is whole ({damaged[0][0].name}: {damaged[0][1]})" if damaged else ""
    if folder is not None and not Path(folder).exists():
        raise UserError(
            f"{flag} {value}: no checkpoint in {place}, for there is no {folder}; if the run was moved, say where "
            "it is by --trainer.default_root_dir"
        )
    if not damaged and folder is not None and (Path(folder) / "export").is_dir():
        raise UserError(
            f"{flag} {value}: no checkpoint in {place}, for the run has ended and kept none; start a new one from its "
            f"export: --model.policy.path {folder}"
        )
    hint = "; --ckpt_path auto starts where there is none" if flag == "--ckpt_path" else ""
    raise UserError(f"{flag} {value}: no checkpoint in {place}{cut}{hint}")


def _best(newest: Path, typed: str) -> Path:
    """The best checkpoint by the account of the newest one, which stands beside it.

    Raises:
        UserError: nothing was monitored, or the best one is gone or damaged.
    """
    callbacks = torch.load(newest, mmap=True, weights_only=True).get("callbacks", {})
    states = [state for name, state in callbacks.items() if str(name).startswith("Checkpoint")]
    state = next((state for state in states if state.get("best_model_score") is not None), None)
    if state is None:
        raise UserError(
            f"{typed}: nothing says which is best, since no measure is monitored; train with --checkpoint.monitor "
            "val/loss, or take last"
        )
    file = newest.parent / Path(state["best_model_path"]).name
    if not file.exists():
        raise UserError(f"{typed}: {file} was the best and is gone; take last, or one of {newest.parent}")
    if (problem := damage(file)) is not None:
        raise UserError(f"{typed}: {file} was the best, and is {problem}; take last")
    return file


def resolve_ckpt_path(value: str | None, verb: str, folder: str | None, dirpath: str | None) -> str | None:
    """What Lightning is given for what `--ckpt_path` says; see `find_checkpoint`. Only training can start without."""
    if value is None:
        return None
    checkpoint = find_checkpoint("last" if value == "auto" and verb != "fit" else value, folder, dirpath)
    return None if checkpoint is None else str(checkpoint)


def _given(value: str, flag: str) -> Path:
    file = Path(value)
    if not file.exists():
        others = [str(path) for path in file.parent.glob("*.ckpt")]
        raise UserError(f"{flag} {value}: no such file{nearest(value, [*others, 'last', 'best', 'auto'])}")
    if (problem := damage(file)) is not None:
        raise UserError(f"{flag} {value}: {problem}; {flag} last finds the newest whole one")
    return file


def _age(file: Path) -> tuple[float, int, str]:
    return float(header(file).get("saved", 0.0)), file.stat().st_mtime_ns, file.name


def damage(file: Path) -> str | None:
    """What is wrong with a file, or None: it must be whole, with every part as it was written. Folders are not looked
    into."""
    return None if file.is_dir() else _damage(file, file.stat().st_mtime_ns, file.stat().st_size)


@lru_cache(maxsize=64)
def _damage(file: Path, changed: int, size: int) -> str | None:
    if not is_whole(file):
        return "not a whole checkpoint"
    try:
        with zipfile.ZipFile(file) as archive:
            part = archive.testzip()  # torch.load would take over flipped bits as they are
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as error:
        return f"not a whole checkpoint ({error})"
    return None if part is None else f"not a whole checkpoint: {part} is not what was written"


def header(file: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, read without its weights; empty where there is nothing to read."""
    try:
        part = file / "meta.pt" if file.is_dir() else file  # a folder is what sharded training saves
        content = torch.load(part, mmap=True, map_location="meta", weights_only=True)
        return dict(content[ENTRY])
    except Exception:  # there is no end to what may be wrong with a file
        return {}


def load(file: Path, read: Callable[[], Any]) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        file: for messages.
        read: gives back its content.

    Raises:
        UserError: it is damaged, or not one that this version can go on from.
    """
    if (problem := damage(file)) is not None:
        raise UserError(f"{file}: {problem}; --ckpt_path last finds the newest whole one")
    try:
        content = read()
    except pickle.UnpicklingError as error:  # nothing that could run code is read
        raise UserError(f"{file}: it holds more than weights and numbers, so it is {_FOREIGN}") from error
    check_format(str(file), content)
    return dict(content)


_FOREIGN = (
    "not a checkpoint of leyden; --ckpt_path takes what a run keeps in its checkpoints/, and --model.policy.path the "
    "folder of a model"
)


def check_format(name: str, content: Any) -> None:
    """That what was read is a checkpoint in the format of this version.

    Raises:
        UserError: it is not.
    """
    entry = content.get(ENTRY) if isinstance(content, dict) else None
    if not isinstance(entry, dict):
        raise UserError(f"{name}: it is {_FOREIGN}")
    if entry.get("format") != FORMAT:
        raise UserError(
            f"{name}: leyden {entry.get('version')} wrote it in format {entry.get('format')}, and leyden {__version__} "
            f"reads format {FORMAT}; go on with that version, or start anew from the run's export (--model.policy.path)"
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, so that a crash never leaves half of one, and reads only sound ones."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        file = Path(path)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary, temporary.open("wb") as stream:
                torch.save(checkpoint, stream)  # to a name, torch's own writer would hide what the system says

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return load(Path(path), lambda: super(AtomicCheckpointIO, self).load_checkpoint(path, *args, **kwargs))
