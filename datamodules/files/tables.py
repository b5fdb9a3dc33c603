"""Text tables (CSV, TSV and the like) to rows. Encoding and delimiter are detected, and reported."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from leyden.errors import UserError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
_SAMPLE = 1 << 16
_CHUNK = 1 << 20
_LONGEST_FIELD = 2**31 - 1

Open = Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Dialect:
    """Encoding and delimiter of a table."""

    encoding: str
    delimiter: str

    def __str__(self) -> str:
        return f"{self.encoding.upper()}, {DELIMITERS.get(self.delimiter, repr(self.delimiter))}"


def read_table(
    path: Path,
    open_: Open,
    report: Callable[[str, str], None],
    note: Callable[[str], None],
    encoding: str | None = None,
    delimiter: str | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table as (`file:line`, row), the line being the one a record starts on; all values are strings."""
    dialect = detect_dialect(path, open_, encoding, delimiter)
    old = dialect.encoding == "cp949" and encoding is None
    note(f"{path}: {dialect}" + (" (not UTF-8; leyden data convert writes UTF-8)" if old else ""))
    csv.field_size_limit(_LONGEST_FIELD)
    with open_() as file, io.TextIOWrapper(file, encoding=_codec(dialect.encoding), newline="") as text:
        reader = csv.reader(text, delimiter=dialect.delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            place = f"{path}:{line}"
            try:
                fields = next(reader)
            except StopIteration:
                break
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not {error.encoding.upper()} text; name another --encoding") from None
            except csv.Error as error:
                problem = _quote_problem(error, reader.line_num)
                if header is None:
                    raise UserError(f"{place}: {problem}") from None
                report(place, problem)
                continue
            if not any(fields):
                continue
            if header is None:
                header = _header(place, fields)
            elif len(fields) == len(header):
                yield place, dict(zip(header, fields, strict=True))
            else:
                report(place, _count_problem(len(fields), len(header), dialect.delimiter))


def detect_dialect(path: Path, open_: Open, encoding: str | None = None, delimiter: str | None = None) -> Dialect:
    """Encoding (UTF-8 with or without BOM, UTF-16 with BOM, CP949) and delimiter (comma, semicolon, tab, pipe)."""
    encoding = known_encoding(encoding) if encoding else _detect_encoding(path, open_)
    if delimiter is not None and len(delimiter) != 1:
        raise UserError(f"--delimiter {delimiter}: a delimiter is one character; type a comma, ';', '|' or tab")
    if delimiter is None:
        with open_() as file:
            data = file.read(_SAMPLE)
        sample = codecs.getincrementaldecoder(_codec(encoding))("replace").decode(data)
        delimiter = _detect_delimiter(sample, len(data) == _SAMPLE)
    return Dialect(encoding, delimiter)


def _detect_encoding(path: Path, open_: Open) -> str:
    with open_() as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return "utf-16"
    bad = _first_bad_byte(open_, "utf-8")
    if bad is None:
        return "utf-8"
    if _first_bad_byte(open_, "cp949") is None:
        return "cp949"
    line, byte = bad
    raise UserError(f"{path}:{line}: byte 0x{byte:02x} is neither UTF-8 nor CP949; name the encoding with --encoding")


def _first_bad_byte(open_: Open, encoding: str) -> tuple[int, int] | None:
    """(line, byte) of the first byte that is not `encoding`, or None; reads the file in pieces."""
    decoder, line = codecs.getincrementaldecoder(encoding)("strict"), 1
    with open_() as file:
        while True:
            chunk = file.read(_CHUNK)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return line + error.object.count(b"\n", 0, error.start), error.object[error.start]
            if not chunk:
                return None
            line += chunk.count(b"\n")


def _detect_delimiter(sample: str, cut: bool) -> str:
    """The delimiter under which most records have as many fields as the header; more fields win a tie."""
    best, best_score = ",", (0.0, 1)
    for delimiter in DELIMITERS:
        records = []
        try:
            for record in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter):
                if any(record):
                    records.append(len(record))
        except csv.Error:
            pass
        if cut and len(records) > 1:
            records.pop()
        if records and records[0] > 1:
            score = (sum(count == records[0] for count in records) / len(records), records[0])
            if score > best_score:
                best, best_score = delimiter, score
    return best


def _header(place: str, fields: list[str]) -> list[str]:
    names = [field.strip().removeprefix("\ufeff").strip() for field in fields]
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"{place}: column {number} of the header has no name; name it (or write without the index)")
        if name in names[: number - 1]:
            raise UserError(f"{place}: two columns are named '{name}'; rename one")
    return names


def _count_problem(count: int, expected: int, delimiter: str) -> str:
    name = DELIMITERS.get(delimiter, repr(delimiter))
    fix = f'put "quotes" around fields that hold a {name}' if count > expected else "fill the missing fields"
    return f"{count} fields, but the header has {expected}; {fix}"


def _quote_problem(error: csv.Error, last_line: int) -> str:
    if "unexpected end" in str(error):
        return f'a quote that opens here is never closed (up to line {last_line}); close it, or write it as ""'
    return f'broken quotes ({error}); write a quote inside a quoted field as ""'


def known_encoding(encoding: str) -> str:
    """The canonical name of an encoding; raises `UserError` for a name that Python does not know."""
    try:
        return {"utf-8-sig": "utf-8"}.get(name := codecs.lookup(encoding).name, name)
    except LookupError:
        raise UserError(f"--encoding {encoding}: no such encoding; type utf-8, cp949 or utf-16") from None


def _codec(encoding: str) -> str:
    return "utf-8-sig" if encoding == "utf-8" else encoding
