"""Text tables (CSV, TSV and the like) to rows. Encoding and delimiter are detected, and reported."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from leyden.datamodules.files.encodings import Open, codec, detect_encoding, known_encoding
from leyden.errors import UserError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
_EXCEL_SEPARATOR = re.compile('\ufeff?"?sep=(.)"?\r?\n', re.IGNORECASE)
_SAMPLE = 1 << 16
_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class Dialect:
    """Encoding and delimiter of a table, and what its first line and its quotes mean."""

    encoding: str
    delimiter: str
    skipped: int = 0
    """Lines before the header: Excel's `sep=;`"""
    doubtful: int = 0
    """The first line of a quoted field that runs over lines which could each be a row; 0 for none"""

    @property
    def literal(self) -> bool:
        """Whether quotes are characters like others: in tables of tabs, which have no rule for them."""
        return self.delimiter == "\t" and self.doubtful > 0

    def __str__(self) -> str:
        quotes = ", quotes taken as they stand" if self.literal else ""
        return f"{self.encoding.upper()}, {DELIMITERS.get(self.delimiter, repr(self.delimiter))}{quotes}"

    def reader(self, text: Iterable[str]) -> Any:
        """A reader of records, that behind `skipped` lines too."""
        lines = islice(text, self.skipped, None)
        if self.literal:
            return csv.reader(lines, delimiter=self.delimiter, quoting=csv.QUOTE_NONE)
        return csv.reader(lines, delimiter=self.delimiter, strict=True)


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
    if dialect.doubtful and not dialect.literal:
        note(
            f"{path}:{dialect.doubtful}: a quoted field runs over lines that could each be a row; if not meant, drop it"
        )
    csv.field_size_limit(_LONGEST_FIELD)
    with open_() as file, io.TextIOWrapper(file, encoding=codec(dialect.encoding), newline="") as text:
        header: list[str] | None = None
        for place, fields in _records(path, dialect.reader(text), dialect, report):
            if not any(fields):
                continue
            if header is None:
                header = _header(place, fields)
            elif [name.strip().removeprefix("\ufeff") for name in fields[: len(header)]] == header:
                note(f"{place}: the header once more, left out")
            elif problem := _row_problem(fields, header, dialect.delimiter):
                report(place, problem)
            else:
                yield place, dict(zip(header, fields, strict=False))


def _records(
    path: Path, reader: Any, dialect: Dialect, report: Callable[[str, str], None]
) -> Iterator[tuple[str, list[str]]]:
    """The records of a table, with their places. Those with broken quotes are reported; in the first, that raises."""
    first = True
    while True:
        place = f"{path}:{reader.line_num + 1 + dialect.skipped}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not {error.encoding.upper()} text; name another --encoding") from None
        except csv.Error as error:
            problem = _quote_problem(error, reader.line_num + dialect.skipped)
            if first:
                raise UserError(f"{place}: {problem}") from None
            report(place, problem)
            continue
        first = first and not any(fields)
        yield place, fields


def detect_dialect(path: Path, open_: Open, encoding: str | None = None, delimiter: str | None = None) -> Dialect:
    """Encoding (UTF-8 or UTF-16, CP949), delimiter (comma, semicolon, tab, pipe), `sep=` line and use of quotes."""
    encoding = known_encoding(encoding) if encoding else detect_encoding(path, open_)
    if delimiter is not None and len(delimiter) != 1:
        raise UserError(f"--delimiter {delimiter}: a delimiter is one character; type a comma, ';', '|' or tab")
    with open_() as file:
        data = file.read(_SAMPLE)
    sample = codecs.getincrementaldecoder(codec(encoding))("replace").decode(data)
    excel = _EXCEL_SEPARATOR.match(sample)
    if delimiter is None:
        delimiter = excel[1] if excel else _detect_delimiter(sample, len(data) == _SAMPLE)
    dialect = Dialect(encoding, delimiter, skipped=int(excel is not None))
    return replace(dialect, doubtful=_rows_in_quotes(open_, dialect))


def _rows_in_quotes(open_: Open, dialect: Dialect) -> int:
    """The first line of a quoted field that runs over lines which are whole rows, closed or not; 0 for none.

    Read as quotes, the rows between them are one.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with open_() as file, io.TextIOWrapper(file, codec(dialect.encoding), "replace", newline="") as text:
        read: list[str] = []
        reader = replace(dialect, skipped=0).reader(_kept(islice(text, dialect.skipped, None), read))
        count = 0
        while True:
            read.clear()
            fields: list[str] | None
            try:
                fields = next(reader)
            except StopIteration:
                return 0
            except csv.Error:
                fields = None
            count = count or len(fields or [])
            if _holds_rows(fields, [line for line in read if line.strip()], dialect.delimiter, count - 1):
                return int(reader.line_num) - len(read) + 1 + dialect.skipped


def _holds_rows(fields: list[str] | None, lines: list[str], delimiter: str, least: int) -> bool:
    """Whether a record over several lines has rows in its quotes. One is enough where quotes have no rule, for tabs;
    texts have commas too, so there half of the lines must be rows.

    Args:
        fields: of the record; None where its quotes are broken.
        lines: that it was read from.
        least: delimiters of a row.
    """
    if len(lines) < 2:
        return False
    rows = [line.count(delimiter) == least for line in lines]
    if all(rows):
        return True
    if fields is not None and not any(delimiter in field.partition("\n")[2] for field in fields):
        return False  # the delimiters stand around the quotes
    return sum(rows[1:]) >= (1 if delimiter == "\t" else len(lines[1:]) / 2)


def _kept(lines: Iterable[str], kept: list[str]) -> Iterator[str]:
    """The same lines; each is put into `kept` too."""
    for line in lines:
        kept.append(line)
        yield line


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
    while not names[-1]:  # Excel writes columns that were emptied
        names.pop()
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"{place}: column {number} of the header has no name; name it (or write without the index)")
        if name in names[: number - 1]:
            raise UserError(f"{place}: two columns are named '{name}'; rename one")
    return names


def _row_problem(fields: list[str], header: list[str], delimiter: str) -> str | None:
    """What is wrong with a record, or None. Empty fields behind the last column are no fields."""
    if any("\0" in field for field in fields):
        return "a NUL character in it; the file is damaged or no text: write it again"
    count = len(fields)
    while count > len(header) and not fields[count - 1].strip():
        count -= 1
    if count == len(header):
        return None
    name = DELIMITERS.get(delimiter, repr(delimiter))
    fix = f'put "quotes" around fields that hold a {name}' if count > len(header) else "fill the missing fields"
    return f"{count} fields, but the header has {len(header)}; {fix}"


def _quote_problem(error: csv.Error, last_line: int) -> str:
    if "unexpected end" in str(error):
        return f'a quote that opens here is never closed (up to line {last_line}); close it, or write it as ""'
    return f'broken quotes ({error}); write a quote inside a quoted field as ""'
