"""JSON Lines, arrays and objects to rows, with the line each starts on. The content decides which a file is."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

from leyden.datamodules.files.encodings import START, advice, codec, guess, utf16
from leyden.errors import UserError

Row = dict[str, Any]
BOM = b"\xef\xbb\xbf"
_BLANK = " \t\r\n"


def read_json(
    path: Path,
    file: IO[bytes],
    report: Callable[[str, str], None],
    note: Callable[[str], None],
    encoding: str | None = None,
) -> Iterator[tuple[str, Row]]:
    """The objects of an open file as (`file:line`, row); `path` only names it. Lines are streamed, arrays read whole.

    Lines that hold no object go to `report`; a broken array raises `UserError`, since the rest cannot be trusted.
    """
    with file:
        start = file.read(START)
        if wide := utf16(start):
            note(f"{path}: UTF-16 text, read as such; UTF-8 is the rule for JSON")
            file = io.BytesIO((start + file.read()).decode(wide, "replace").encode())
            start, encoding = file.read(START), None
        elif start.startswith(BOM):
            note(f"{path}: starts with a byte order mark, left out")
        first = start.removeprefix(BOM).lstrip()
        if first[:1] == b"[":
            if ".jsonl" in path.name:
                note(f"{path}: a JSON array in a file named .jsonl, read as an array")
            yield from _array(path, start + file.read(), encoding)
            return
        file.seek(0)
        document = _document(path, file, encoding or "utf-8", note) if first[:1] == b"{" else None
        file.seek(0)
        yield from document or _lines(path, file, report, note, encoding or "utf-8")


def _lines(
    path: Path, file: IO[bytes], report: Callable[[str, str], None], note: Callable[[str], None], encoding: str
) -> Iterator[tuple[str, Row]]:
    commas = False
    for number, raw in enumerate(file, start=1):
        line = raw.removeprefix(BOM).strip()
        if not line:
            continue
        place = f"{path}:{number}"
        if line.endswith(b"},"):
            line = line[:-1]
            if not commas:
                note(f"{place}: a comma behind the object, left out (and in lines below)")
            commas = True
        try:
            row = _whole_characters(_loads(line.decode(encoding)), b"\\u" in line)
        except UnicodeDecodeError as error:
            report(place, _not_text(path, line, error))
        except (ValueError, RecursionError) as error:
            report(place, _broken_line(error, line, whole=raw.endswith(b"\n")))
        else:
            if isinstance(row, dict):
                yield place, row
            else:
                report(place, f"{_kind(row)}, not an object; write one {{...}} a line")


def _document(
    path: Path, file: IO[bytes], encoding: str, note: Callable[[str], None]
) -> Iterator[tuple[str, Row]] | None:
    """The rows of a file that is no JSON Lines but objects over many lines, several on one line, or one object that
    holds the rows as a list; None for JSON Lines."""
    first = b""
    while not first.strip():
        first = file.readline()
    try:
        whole = _loads(first.removeprefix(BOM).decode(encoding))
        if not isinstance(whole, dict) or file.read(START).strip():
            return None
    except (ValueError, RecursionError):
        pass
    file.seek(0)
    try:
        text = file.read().decode(codec(encoding))
        row, end = _DECODER.raw_decode(text, _skip(text, 0, _BLANK))
    except (ValueError, RecursionError):
        return None
    rest = _skip(text, end, _BLANK)
    if text[rest : rest + 1] not in ("", "{"):
        return None
    name = _list_of_rows(row) if rest == len(text) else None
    if name is None:
        if rest == len(text):
            _check_rows(path, row)
        return _objects(path, text)
    others = [key for key in row if key != name]
    note(f"{path}: the rows are the list '{name}'" + (f"; not read: {', '.join(others)}" if others else ""))
    start = text.index("[", re.search(f"{re.escape(json.dumps(name, ensure_ascii=False))}\\s*:", text).end())  # type: ignore[union-attr]
    return _elements(path, text, start + 1, text.count("\n", 0, start) + 1)


def _check_rows(path: Path, document: Row) -> None:
    """Raise `UserError` for the one object of a file that is a table by columns."""
    values = list(document.values())
    tables = all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values)
    lists = all(isinstance(value, list) and value and all(isinstance(one, str) for one in value) for value in values)
    if len(values) > 1 and (tables or (lists and len({len(value) for value in values}) == 1)):
        raise UserError(
            f"{path}: a table by columns ({', '.join(list(document)[:4])}), not rows; write rows, as pandas does with "
            "to_json(orient='records', lines=True, force_ascii=False)"
        )


def _list_of_rows(document: Row) -> str | None:
    """The key of an object whose value is a list of rows, where there is one and it is no row itself."""
    names = [
        key
        for key, value in document.items()
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
    ]
    known = {"data", "rows", "train", "examples", "instances", "items", "records", "samples"}
    return names[0] if len(names) == 1 and (names[0].lower() in known) else None


def _objects(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    """The objects of a text that has one behind the other, each with the line it starts on."""
    yield from _elements(path, text, 0, 1, closed=False)


def _array(path: Path, data: bytes, encoding: str | None) -> Iterator[tuple[str, Row]]:
    """The objects of a JSON array."""
    try:
        text = data.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: {_not_text(path, data, error)}") from None
    start = text.find("[")
    at, line = yield from _elements(path, text, start + 1, text.count("\n", 0, start) + 1)
    rest = _skip(text, at, " \t\r\n")
    if rest < len(text):
        line += text.count("\n", at, rest)
        raise UserError(f"{path}:{line}: text after the end of the array; one file holds one array")


def _elements(
    path: Path, text: str, at: int, line: int, closed: bool = True
) -> Generator[tuple[str, Row], None, tuple[int, int]]:
    """The objects from `at` on, up to a closing bracket or the end of the text. Returns where that is, and its line.

    The place of an object is the line it starts on, and of others on the same line its column too: `file:1:53`.
    """
    counted, before = at, 0
    while True:
        at = _skip(text, at, _BLANK + ",")
        line += text.count("\n", counted, at)
        counted = at
        if at >= len(text) and closed:
            raise UserError(f"{path}:{line}: the array never ends with ']', the file seems cut off; copy it again")
        if at >= len(text) or (closed and text[at] == "]"):
            return at + 1, line
        place = f"{path}:{line}" if line != before else f"{path}:{line}:{at - text.rfind(chr(10), 0, at)}"
        before = line
        try:
            row, at = _DECODER.raw_decode(text, at)
            _whole_characters(row, "\\u" in text)
        except json.JSONDecodeError as error:
            problem = f"broken JSON ({_reason(error)})"
            raise UserError(f"{path}:{error.lineno}: {problem}; mend this line of the array") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: {_reason(error)}; mend it") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: {_kind(row)}, not an object; the array must hold objects {{...}}")
        yield place, row


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """An object of its keys and values. Raises `ValueError` where a key stands twice: only one could be kept."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{twice}' stands twice in an object")
    return row


def _whole_characters(row: Any, escapes: bool) -> Any:
    """The same row. Raises `ValueError` where an escape is half of a character: no tokenizer takes it."""
    try:
        if escapes:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character, {error.object[error.start]!a}, in it") from None
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _loads(text: str) -> Any:
    return _DECODER.decode(text)


def _not_text(path: Path, data: bytes, error: UnicodeDecodeError) -> str:
    problem = f"not valid {error.encoding.upper()} (byte 0x{data[error.start]:02x} at position {error.start + 1})"
    if error.encoding != "utf-8":
        return f"{problem}; name another --encoding"
    looks = f", it looks like {likely.upper()}" if (likely := guess(data)) else ""
    return f"{problem}{looks}; run: {advice(path, data)}"


def _broken_line(error: Exception, line: bytes, whole: bool) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"{_reason(error)}; mend this line"
    if line.startswith((b"{'", b"{ '")):
        return "Python's quotes, not JSON; write lines with json.dumps(row, ensure_ascii=False)"
    if whole:
        return f"broken JSON ({_reason(error)}); write one complete JSON object a line"
    return f"broken JSON ({_reason(error)}) in a last line without a line end: the file seems cut off; copy it again"


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        what = error.msg.removesuffix(" at")
        return f"{what[:1].lower()}{what[1:]} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {list: "an array", str: "a string", bool: "true or false"}.get(type(value), "a number")


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at
