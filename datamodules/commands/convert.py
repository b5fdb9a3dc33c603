"""Conversion of tables and JSON files to clean JSONL: named columns, UTF-8, composed Hangul, every lost row reported.

Each output is written under a temporary name and renamed when it is complete, so an error leaves no partial file.
Rows that cannot be used go to `NAME.rejected.jsonl`, with the place and the problem.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar

from leyden import language
from leyden.atomic import replacing
from leyden.datamodules.files.files import extension, find_files, read_rows, stem
from leyden.datamodules.files.hangul import composed
from leyden.datamodules.formats.columns import check_columns, names_of
from leyden.datamodules.formats.format import Format
from leyden.datamodules.formats.formats import describe, detect, format_named, parse
from leyden.datamodules.formats.not_read import is_empty
from leyden.datamodules.formats.preference_readers import listed
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.source import HEAD
from leyden.errors import UserError

_LISTS = ("ranking", "responses", "scores")
"""Columns that hold lists; the cells of a table hold them as text."""

_T = TypeVar("_T")


@dataclass
class Conversion:
    """Options: `columns` (canonical name -> column), `encoding`, `delimiter` and `kind` override what is detected."""

    columns: Mapping[str, str] = field(default_factory=dict)
    encoding: str | None = None
    delimiter: str | None = None
    overwrite: bool = False
    kind: str | None = None


def convert(source: str, target: str | None, how: Conversion, say: Callable[[str], None] = language.say) -> int:
    """Convert a file, or every table and JSON file of a folder. Returns 0, or 1 where rows were rejected.

    Without `target` each output goes to the folder of its original, with the extension changed. An output that exists
    is an error before anything is written, unless `how.overwrite` is set. Of several files, every one that can be is
    converted: files whose output exists are skipped with a note, and files that cannot be used are named in one
    `UserError` at the end. Once they are mended, the same command converts the rest.
    """
    several, pairs = _targets(source, target, say)
    if several:
        return _convert_several(pairs, how, say)
    file, out = pairs[0]
    if out.exists() and not how.overwrite:
        raise UserError(f"{out}: exists already; add --overwrite, or name another output")
    return 1 if _convert_file(file, out, how, say) else 0


def _convert_several(pairs: list[tuple[Path, Path]], how: Conversion, say: Callable[[str], None]) -> int:
    rejected = 0
    written: list[str] = []
    failed: list[str] = []
    for file, out in pairs:
        if out.exists() and not how.overwrite:
            say(f"{file}: skipped, {out} exists already; --overwrite writes it again")
            continue
        try:
            rejected += _convert_file(file, out, how, say)
            written.append(str(out))
        except UserError as error:
            say(f"error: {error}")
            failed.append(str(file))
    if failed:
        raise UserError(
            f"not converted: {', '.join(failed)} (see above); written: {', '.join(written) or 'nothing'}; "
            "mend what is wrong and type the same again"
        )
    return 1 if rejected else 0


def counted(items: Iterable[_T], what: str) -> Iterator[_T]:
    """The same items, with a running count on the terminal."""
    show = sys.stderr.isatty()
    for number, item in enumerate(items, start=1):
        if show and number % 5000 == 0:
            language.say(f"\r{what}: {number:,} rows", end="", file=sys.stderr, flush=True)
        yield item
    if show:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """A UTF-8 text file that appears under its name only when it is complete, replacing what was there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); name another output") from None


def rejected_path(path: Path) -> Path:
    """The path of `NAME.rejected.jsonl`, in the folder of a file."""
    return path.with_name(path.name.removesuffix(".gz").rpartition(".")[0] + ".rejected.jsonl")


def _targets(source: str, target: str | None, say: Callable[[str], None]) -> tuple[bool, list[tuple[Path, Path]]]:
    """Whether `source` stands for several files, and the pairs of a file and its output."""
    folder = Path(source).expanduser().is_dir()
    files = [file for file in find_files(source, say, originals=True) if extension(file) != ".jsonl" or not folder]
    if not files:
        raise UserError(f"{source}: nothing to convert, only JSONL in it; name a file to convert it")
    many = folder or len(files) > 1
    out = None if target is None else Path(target).expanduser()
    if out is not None and not many and not out.is_dir():
        if out.suffix != ".jsonl":
            raise UserError(f"{out}: the output is JSONL; name it {out.with_suffix('.jsonl')}")
        return False, [(files[0], out)]
    if out is not None and out.is_file():
        raise UserError(f"{out}: a file, but {source} holds several; name a folder")
    pairs = [(file, (out or file.parent) / (stem(file) + ".jsonl")) for file in files]
    for index, (file, path) in enumerate(pairs):
        if path == file:
            raise UserError(f"{file}: JSONL already; name the output to write it again")
        if path in [other for _, other in pairs[:index]]:
            raise UserError(f"{file}: {path} would be written twice; rename one of the originals")
    return many, pairs


def _convert_file(file: Path, out: Path, how: Conversion, say: Callable[[str], None]) -> int:
    """Convert one file and return how many rows were rejected."""
    rejects: list[dict[str, Any]] = []
    written = 0
    rows = read_rows(
        file,
        lambda place, problem: rejects.append({"place": place, "problem": problem}),
        on_note=say,
        encoding=how.encoding,
        delimiter=how.delimiter,
    )
    rows = ((place, composed(row)) for place, row in rows)
    head = list(islice(rows, HEAD))
    if not head:
        first = f" (first: {rejects[0]['place']}: {rejects[0]['problem']})" if rejects else ""
        raise UserError(f"{file}: no usable row in it{first}; give a file with data")
    converter = _row_converter(file, [row for _, row in head], composed(dict(how.columns)), how.kind)
    with whole_file(out) as output:
        for place, row in counted(chain(head, rows), file.name):
            try:
                output.write(converter(row) + "\n")
                written += 1
            except RowError as error:
                rejects.append({"place": place, "problem": str(error), "row": row})
        if written == 0:
            raise UserError(f"{file}: none of its {len(rejects)} rows can be used; {rejects[0]['problem']}")
        write_rejects(rejected_path(out), rejects, how.overwrite)
    extra_columns = [str(column) for column in head[0][1] if column not in converter.renames.values()]
    extra = f"; kept {', '.join(extra_columns)}" if extra_columns else ""
    say(f"{file} -> {out}: {written:,} rows, {converter.kind} data as {converter.description}{extra}")
    if rejects:
        one = min(rejects, key=lambda reject: [int(n) for n in str(reject["place"]).split(":") if n.isdigit()])
        say(f"  {len(rejects):,} rows rejected -> {rejected_path(out)} (first: {one['place']}: {one['problem']})")
    return len(rejects)


@dataclass
class _RowConverter:
    """Rewrites the rows of one file. A call with a row returns its JSON line, or raises `RowError`."""

    kind: str
    format: str
    renames: dict[str, str]
    """Canonical name -> column"""
    description: str

    def __call__(self, row: Mapping[str, Any]) -> str:
        if type(format_named(self.format, self.kind)).gather is Format.gather:  # else one row is no example
            with suppress(LeftOut):
                parse(row, self.format, self.kind, self.renames, rank_order="lower_is_better")  # any order will do
        columns = {name: column for name, column in self.renames.items() if column in row}
        for name, column in columns.items():
            if name != column and name not in columns.values() and not is_empty(row.get(name)):
                problem = f"'{column}' would become '{name}', which the row has too; keep one of the two columns"
                raise RowError(problem, "two columns of one name")
        renamed = {name: listed(row[col], name) if name in _LISTS else row[col] for name, col in columns.items()}
        rest = {str(column): value for column, value in row.items() if column not in columns.values()}
        renamed |= {column: value for column, value in rest.items() if column not in renamed}  # those are empty
        try:
            line = json.dumps(renamed, ensure_ascii=False, allow_nan=False, default=_plain)
            line.encode()
        except ValueError as error:  # NaN, bytes, half a character
            problem = f"a value cannot be written as JSON ({error}); mend or drop its column"
            raise RowError(problem, "not JSON") from None
        return line


def _row_converter(file: Path, rows: list[dict[str, Any]], columns: dict[str, str], kind: str | None) -> _RowConverter:
    for name, column in columns.items():
        if name != column and name in rows[0] and name not in columns.values():
            raise UserError(f"{file}: '{column}' cannot become '{name}', there is such a column; rename one of them")
    try:
        check_columns(rows, columns)
        kind, format = (kind, detect(rows, kind, columns)) if kind else _kind_and_format(rows, columns)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    column_of = names_of(rows[0], columns)
    form = format_named(format, kind)
    reads = form.columns(kind, answers=kind != "prompts")
    names = [*reads, *form.optional, *columns]
    renames = {name: column_of[name] for name in names if name in column_of}
    return _RowConverter(kind, format, renames, describe(rows, format, kind, columns))


def _kind_and_format(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> tuple[str, str]:
    if "label" in columns:
        return "unpaired", detect(rows, "unpaired", columns)
    if {"prompt", "response"} <= set(columns):
        return "instruction", "prompt-response"
    if "text" in columns:
        return "instruction", "text"
    if {"chosen", "rejected"} & set(columns):
        return "preference", detect(rows, "preference", columns)
    for kind in ("preference", "instruction"):
        try:
            return kind, detect(rows, kind, columns)
        except UserError as error:
            problem = error
    if "prompt" in columns:
        return "prompts", "prompt"
    raise problem


def write_rejects(path: Path, rejects: list[dict[str, Any]], overwrite: bool) -> None:
    """Write one JSON object for each rejected row. Without any, and with `overwrite`, remove the file."""
    if rejects:
        with whole_file(path) as file:
            for reject in rejects:
                file.write(json.dumps(reject, default=repr) + "\n")
    elif overwrite:
        path.unlink(missing_ok=True)  # of an earlier conversion


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        raise ValueError("bytes")
    return str(value)
