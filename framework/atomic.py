"""Files and folders that are written whole or not at all, whatever stops the process."""

from __future__ import annotations

import glob
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from leyden.errors import UserError

_OLD = ".old"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to. It takes the place of `path` once it is on the disk, and
    vanishes where something goes wrong.

    A folder cannot be renamed over another, so the old one steps aside first. Where the process is killed before the
    new one is in its place, the next call, or `remove_unfinished`, puts the old one back.
    """
    _put_back(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    aside = temporary.with_name(temporary.name + _OLD)
    try:
        yield temporary
        _as_umask_says(temporary)
        for file in [*temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            if file.is_file():
                _sync(file, os.O_RDWR)
        if temporary.is_dir() and path.is_dir():
            os.replace(path, aside)
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself must reach the disk; some file systems cannot sync a folder
            with suppress(OSError):
                _sync(path.parent, os.O_RDONLY)
    finally:
        if aside.is_dir() and not path.exists():
            os.replace(aside, path)
        for left in (temporary, aside):
            _remove(left)


def _put_back(folder: Path, name: str = "*") -> None:
    """Put folders back that stepped aside for one that never came, and remove those whose place was taken."""
    pattern = name if name == "*" else glob.escape(name)
    for aside in folder.glob(f".{pattern}.*{_OLD}"):
        wanted, process = aside.name.removesuffix(_OLD)[1:].rpartition(".")[::2]
        if wanted and process.isdigit() and process != str(os.getpid()):
            if folder.joinpath(wanted).exists():
                _remove(aside)
            else:
                os.replace(aside, folder / wanted)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _as_umask_says(written: Path) -> None:
    """Give files and folders the rights that new ones have there: some libraries write by way of private ones."""
    probe = written.with_name(f"{written.name}.mode")
    try:
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        for path in (written, *(written.rglob("*") if written.is_dir() else ())):
            wanted = mode | (mode & 0o444) >> 2 if path.is_dir() else mode  # who may read may look into folders
            if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != wanted:
                with suppress(OSError):  # some file systems have no rights
                    path.chmod(wanted)
    finally:
        probe.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, text: str) -> None:
    """Write a text file (UTF-8) whole or not at all."""
    with replacing(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)


def truncate_jsonl(file: Path, step: int) -> None:
    """Keep the lines of a JSONL file whose `step` is at most `step`, without a last one that was cut off. A file that
    is missing stays so.

    Raises:
        UserError: the file cannot be written.
    """
    if not file.is_file():
        return
    with file.open(encoding="utf-8", newline="\n") as stream:  # `splitlines` would end lines inside of texts, at U+2028
        lines = [line for line in stream if line.endswith("\n")]
    with writing(file):
        write_whole(file, "".join(line for line in lines if int(json.loads(line)["step"]) <= step))


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed had begun to write, files and folders named `.NAME.PROCESS`, and put back
    what had stepped aside for it."""
    for inside in (folder, folder / "checkpoints"):
        _put_back(inside)
        for path in inside.glob(".*"):
            if path.suffix[1:].isdigit() and path.suffix[1:] != str(os.getpid()):
                _remove(path)


def is_whole(file: Path) -> bool:
    """Whether a checkpoint was written to its end: the archive's directory is its last part."""
    return zipfile.is_zipfile(file)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn what goes wrong while a file of a run is written, a full disk above all, into one line.

    Libraries hide the system's error behind their own, so it is looked for in what the error came from.

    Raises:
        UserError: the file could not be written.
    """
    try:
        yield
    except Exception as error:
        if (cause := _system_error(error)) is None:
            raise
        raise UserError(
            f"{file}: cannot be written ({cause}); what was saved before is whole: make room, then go on with "
            "--ckpt_path last"
        ) from error


def _system_error(error: BaseException | None) -> str | None:
    """What the system said, somewhere in a chain of errors."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if "No space left on device" in str(error):  # as safetensors says it
            return "No space left on device"
        error = error.__cause__ or error.__context__
    return None
