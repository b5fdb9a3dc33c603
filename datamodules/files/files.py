"""Files to rows: JSONL, JSON, CSV, TSV, Parquet, Arrow, folders and globs of them, and hub datasets.

Every row comes with the place it starts at, `file:line` (in Parquet, Arrow and hub datasets, which have no lines, the
number of the row). Encodings are always explicit. JSON Lines, tables and Parquet are streamed; an array or UTF-16 text
is read whole. The content decides, not the name: an array in a file named .jsonl is read as an array (with a note), and
JSON Lines in a file named .json as JSON Lines.
"""

from __future__ import annotations

import glob
import logging
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from leyden.datamodules.files.encodings import START, known_encoding
from leyden.datamodules.files.hub import read_hub
from leyden.datamodules.files.json_rows import BOM, read_json
from leyden.datamodules.files.opening import (
    COMPRESSED,
    SPREADSHEETS,
    check_text,
    inner_name,
    named_errors,
    open_binary,
)
from leyden.datamodules.files.tables import read_table
from leyden.errors import UserError, first_line, nearest

log = logging.getLogger("leyden")

Row = dict[str, Any]
OnBad = Callable[[str, str], None]
"""Called with the place and the problem of a row that cannot be read; the row is then left out."""
OnNote = Callable[[str], None]
"""Called with a note on what a reader detected, such as an encoding."""

EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_OTHER_NAMES = {".ndjson": ".jsonl", ".tab": ".tsv", ".feather": ".arrow"}
_ADVICE = {
    **dict.fromkeys(SPREADSHEETS, "a spreadsheet; save it as 'CSV UTF-8' (Excel: File, Save As) and give that"),
    ".txt": "a table of Excel ('Unicode Text') is read when named .tsv, plain text as lines of {\"text\": …} in .jsonl",
    ".tar": "an archive; unpack it and give the folder",
    ".tgz": "an archive; unpack it and give the folder",
}
SHOWN = 5
"""Names that a note lists."""


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
        yield from read_hub(str(path))
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
        return _of_folder(path, target, on_note, originals)
    if target is not None:
        return [target]
    if glob.has_magic(str(path)):
        matches = sorted(Path(file) for file in glob.glob(str(Path(path).expanduser()), recursive=True))
        files = [file for file in matches if file.is_file()]
        if not files:
            raise UserError(f"{path}: no file matches this pattern; quote it and check the folder")
        inside = any(folder in file.parents for folder in matches if folder.is_dir() for file in files)
        if on_note is not None and len(files) < len(matches) and not inside:
            _note_unread(str(path), [file for file in matches if not file.is_file()], on_note)
        return files
    raise UserError(f"{path}: no such file{_path_hint(Path(path))}")


def stem(path: Path) -> str:
    """The name without its extension and the `.gz` or the like of a compressed file."""
    name = path.stem if path.suffix.lower() in COMPRESSED else path.name
    return name.removesuffix(Path(name).suffix) if Path(name).suffix.lower() in _KNOWN else name


def extension(path: Path) -> str:
    """The extension that says what a file holds, without the `.gz` or the like of a compressed one."""
    found = Path(inner_name(path).lower()).suffix
    return _OTHER_NAMES.get(found, found)


_KNOWN = (*EXTENSIONS, *_OTHER_NAMES, *_ADVICE)


def _read_file(
    path: Path, report: OnBad, note: OnNote, encoding: str | None, delimiter: str | None
) -> Iterator[tuple[str, Row]]:
    with named_errors(path):
        kind = extension(path)
        if path.suffix.lower() == ".zip":
            open_binary(path).close()  # says what is wrong with an archive
        if kind not in EXTENSIONS:
            use = _ADVICE.get(kind, f"use one of {', '.join(EXTENSIONS)} (or .gz, .bz2, .xz, .zst, .zip of them)")
            raise UserError(f"{path}: unknown kind of file '{kind}'; {use}")
        if kind in (".parquet", ".arrow"):
            yield from _columnar(path, kind)
            return
        with open_binary(path) as file:
            start = file.read(START)
        check_text(path, start)
        if not start.strip(BOM + b" \t\r\n"):
            raise UserError(f"{path}: the file is empty; give a file with data")
        if kind in (".csv", ".tsv"):
            yield from read_table(path, lambda: open_binary(path), report, note, encoding, delimiter)
        else:
            yield from read_json(path, open_binary(path), report, note, encoding)


def _columnar(path: Path, kind: str) -> Iterator[tuple[str, Row]]:
    """The rows of a Parquet file, or of an Arrow file or stream (which is what `datasets` saves)."""
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; give a file with data")
    compressed = path.suffix.lower() in COMPRESSED
    try:
        file = pyarrow.BufferReader(open_binary(path).read()) if compressed else pyarrow.memory_map(str(path))
        number = 0
        for batch in _batches(file, kind):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, pyarrow.ArrowInvalid) as error:
        with open(path, "rb") as stream:
            check_text(path, stream.read(64))
        name, reason = ("a Parquet" if kind == ".parquet" else "an Arrow"), first_line(error)
        raise UserError(f"{path}: not {name} file that can be read ({reason}); write it again") from None


def _batches(file: Any, kind: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if kind == ".parquet":
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
    elif bytes(file.read(6)) == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)


def _raise_problem(place: str, problem: str) -> NoReturn:
    raise UserError(f"{place}: {problem}")


def _of_folder(path: str | Path, folder: Path, on_note: OnNote | None, originals: bool) -> list[Path]:
    """The data files that lie in a folder itself; every other thing in it goes to `on_note`."""
    try:
        everything = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be read ({error.strerror}); check its permissions") from None
    files = [file for file in everything if _is_data(file)]
    if any(extension(file) == ".arrow" for file in files):  # as `save_to_disk` writes them, with an account in JSON
        files = [file for file in files if file.name not in ("dataset_info.json", "state.json", "dataset_dict.json")]
    others = [file for file in everything if file not in files]
    if not files:
        deeper = [other for other in others if other.is_dir() and not other.name.startswith(".")]
        more = f"; of the folders in it give one, such as {deeper[0]}, or all, as '{path}/**/*.jsonl'" if deeper else ""
        raise UserError(f"{path}: no data file in this folder; it needs {', '.join(EXTENSIONS)} files{more}")
    if on_note is not None and others:
        _note_unread(str(path), others, on_note)
    return files if originals else _unconverted(files, on_note)


def _note_unread(path: str, others: list[Path], on_note: OnNote) -> None:
    """Say what of a folder is not read, the things that may be data in front."""
    folders = [other for other in others if other.is_dir()]
    links = [other for other in others if not other.exists()]
    files = [other for other in others if other not in folders and other not in links]
    for what, kept in (("", files), (" (folders; '**/*.jsonl' reads what is in them)", folders), (" (links)", links)):
        if kept:
            more = f" and {len(kept) - SHOWN:,} more" if len(kept) > SHOWN else ""
            on_note(f"{path}: not read: {', '.join(other.name for other in kept[:SHOWN])}{more}{what}")


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
