"""Files to rows: JSONL, JSON, CSV, TSV, Parquet, folders and globs of them, and hub datasets.

Every row comes with the place it starts at, `file:line` (in Parquet and hub datasets, which have no lines, the number
of the row). Encodings are always explicit. JSON Lines, tables and Parquet are streamed; an array or UTF-16 text is
read whole. The content decides, not the name: an array in a file named .jsonl is read as an array (with a note), and
JSON Lines in a file named .json as JSON Lines.
"""

from __future__ import annotations

import glob
import gzip
import logging
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from leyden.datamodules.files.json_rows import BOM, read_json
from leyden.datamodules.files.tables import known_encoding, read_table
from leyden.errors import UserError, nearest

log = logging.getLogger("leyden")

Row = dict[str, Any]
OnBad = Callable[[str, str], None]
"""Called with the place and the problem of a row that cannot be read; the row is then left out."""
OnNote = Callable[[str], None]
"""Called with a note on what a reader detected, such as an encoding."""

EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_rows(
    path: str | Path,
    on_bad: OnBad | None = None,
    *,
    on_note: OnNote = log.info,
    encoding: str | None = None,
    delimiter: str | None = None,
) -> Iterator[tuple[str, Row]]:
    """Every row of `path` as (`file:line`, row): a file, a folder, a glob, or `hf:NAME` / `hf:NAME:SPLIT`.

    A row that cannot be read raises a `UserError`, or goes to `on_bad(place, problem)` and is left out. A file that
    cannot be read at all (missing, empty, a broken array or header) always raises. `encoding` and `delimiter`
    override what is detected.
    """
    report = on_bad or _raise_problem
    encoding = known_encoding(encoding) if encoding else None
    if str(path).startswith("hf:"):
        yield from _hub(str(path))
        return
    for file in find_files(path, on_note):
        has_rows = False

        def reported(place: str, problem: str) -> None:
            nonlocal has_rows
            has_rows = True
            report(place, problem)

        for place, row in _read_file(file, reported, on_note, encoding, delimiter):
            has_rows = True
            yield place, row
        if not has_rows:
            raise UserError(f"{file}: no rows in it; give a file with data")


def find_files(path: str | Path, on_note: OnNote | None = None, originals: bool = False) -> list[Path]:
    """The data files that a path, a folder or a glob stands for, sorted by name.

    Of a folder that was converted in place only the JSONL counts, so that no row is read twice: a file with a
    `STEM.jsonl` in the same folder is left out, with a note, unless `originals` is set.
    """
    target = _existing(Path(path).expanduser())
    if target is not None and target.is_dir():
        files = sorted(file for file in target.iterdir() if _is_data(file))
        if not files:
            raise UserError(f"{path}: no data file in this folder; it needs {', '.join(EXTENSIONS)} files")
        return files if originals else _unconverted(files, on_note)
    if target is not None:
        return [target]
    if glob.has_magic(str(path)):
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if files:
            return files
        raise UserError(f"{path}: no file matches this pattern; quote it and check the folder")
    raise UserError(f"{path}: no such file{_path_hint(Path(path))}")


def stem(path: Path) -> str:
    """The name without its extension and the `.gz` of a compressed file."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name.removesuffix(Path(name).suffix)


def extension(path: Path) -> str:
    """The extension that says what a file holds, without the `.gz` of a compressed one."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressing `.gz`."""
    opened = gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")
    return cast(IO[bytes], opened)


def _read_file(
    path: Path, report: OnBad, note: OnNote, encoding: str | None, delimiter: str | None
) -> Iterator[tuple[str, Row]]:
    kind = extension(path)
    if kind not in EXTENSIONS:
        raise UserError(f"{path}: unknown kind of file '{kind}'; use one of {', '.join(EXTENSIONS)} (or .gz of them)")
    try:
        if kind == ".parquet":
            yield from _parquet(path)
            return
        with open_binary(path) as file:
            start = file.read(4096)
        if not start.strip(BOM + b" \t\r\n"):
            raise UserError(f"{path}: the file is empty; give a file with data")
        if kind in (".csv", ".tsv"):
            yield from read_table(path, lambda: open_binary(path), report, note, encoding, delimiter)
        else:
            yield from read_json(path, open_binary(path), report, note, encoding)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the compressed file is broken or cut off ({error}); copy it again") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); check the file and its permissions") from None


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({reason}); write it again") from None


def _hub(name: str) -> Iterator[tuple[str, Row]]:
    import datasets

    repository, _, split = name.removeprefix("hf:").partition(":")
    try:
        data = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # a dozen kinds, all about the name, the split or the network
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: cannot be loaded ({reason}); check the name, hf:NAME:SPLIT, and the network"
        ) from None
    for number, row in enumerate(data, start=1):
        yield f"{name}:{number}", dict(row)


def _raise_problem(place: str, problem: str) -> NoReturn:
    raise UserError(f"{place}: {problem}")


def _is_data(file: Path) -> bool:
    hidden = file.name.startswith((".", "_"))
    return file.is_file() and not hidden and extension(file) in EXTENSIONS and not stem(file).endswith(".rejected")


def _unconverted(files: list[Path], on_note: OnNote | None) -> list[Path]:
    """The files of a folder without those that have a JSONL of the same name there."""
    converted = {stem(file) for file in files if extension(file) == ".jsonl"}
    left = [file for file in files if extension(file) == ".jsonl" or stem(file) not in converted]
    if len(left) < len(files) and on_note is not None:
        names = ", ".join(file.name for file in files if file not in left)
        on_note(f"{files[0].parent}: not read, because there is a .jsonl of the same name: {names}")
    return left


def _existing(path: Path) -> Path | None:
    """The path, or the same name in the other Unicode form: files copied from a Mac have decomposed Hangul names."""
    forms = [path, *(Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))]
    return next((form for form in forms if form.exists()), None)


def _path_hint(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder}); check the path"
    names = [file.name for file in folder.iterdir() if file.is_dir() or _is_data(file)]
    return nearest(path.name, names) or f" in {folder}; check the path"
