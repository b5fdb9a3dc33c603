"""JSON Lines and JSON arrays to rows, with the line each starts on. The content decides which of the two a file is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from leyden.errors import UserError

Row = dict[str, Any]
BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_START = 4096


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
        start = file.read(_START)
        if start.startswith(_UTF16):
            note(f"{path}: UTF-16 text, read as such; UTF-8 is the rule for JSON")
            file = io.BytesIO((start + file.read()).decode("utf-16", "replace").encode())
            start, encoding = file.read(_START), None
        elif start.startswith(BOM):
            note(f"{path}: starts with a byte order mark, left out")
        first = start.removeprefix(BOM).lstrip()
        if first[:1] == b"[":
            if ".jsonl" in path.name:
                note(f"{path}: a JSON array in a file named .jsonl, read as an array")
            yield from _array(path, start + file.read(), encoding)
        elif ".jsonl" not in path.name and first.split(b"\n")[0].strip() == b"{":
            raise UserError(f"{path}: one JSON object over many lines, not rows; write an array [{{...}}, {{...}}]")
        else:
            file.seek(0)
            yield from _lines(path, file, report, encoding or "utf-8")


def _lines(path: Path, file: IO[bytes], report: Callable[[str, str], None], encoding: str) -> Iterator[tuple[str, Row]]:
    for number, raw in enumerate(file, start=1):
        line = raw.removeprefix(BOM).strip()
        if not line:
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line.decode(encoding))
        except UnicodeDecodeError as error:
            report(place, _not_text(path, line, error))
        except (ValueError, RecursionError) as error:
            report(place, _broken_line(error, whole=raw.endswith(b"\n")))
        else:
            if isinstance(row, dict):
                yield place, row
            else:
                report(place, f"{_kind(row)}, not an object; write one {{...}} a line")


def _array(path: Path, data: bytes, encoding: str | None) -> Iterator[tuple[str, Row]]:
    """The objects of a JSON array, each with the line it starts on."""
    try:
        text = data.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: {_not_text(path, data, error)}") from None
    decoder, at, counted, line = json.JSONDecoder(), text.find("[") + 1, 0, 1
    while True:
        at = _skip(text, at, " \t\r\n,")
        line += text.count("\n", counted, at)
        counted = at
        if at >= len(text):
            raise UserError(f"{path}:{line}: the array never ends with ']', the file seems cut off; copy it again")
        if text[at] == "]":
            break
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            problem = f"broken JSON ({_reason(error)})"
            raise UserError(f"{path}:{error.lineno}: {problem}; mend this line of the array") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{line}: {_kind(row)}, not an object; the array must hold objects {{...}}")
        yield f"{path}:{line}", row
    rest = _skip(text, at + 1, " \t\r\n")
    if rest < len(text):
        line += text.count("\n", counted, rest)
        raise UserError(f"{path}:{line}: text after the end of the array; one file holds one array")


def _not_text(path: Path, data: bytes, error: UnicodeDecodeError) -> str:
    problem = f"not valid {error.encoding.upper()} (byte 0x{data[error.start]:02x} at position {error.start + 1})"
    try:
        if error.encoding != "utf-8":
            return f"{problem}; name another --encoding"
        data.decode("cp949")
    except UnicodeDecodeError:
        return f"{problem}; save the file as UTF-8"
    return f"{problem}, it looks like CP949; run: leyden data convert {path} NEW.jsonl --encoding cp949"


def _broken_line(error: Exception, whole: bool) -> str:
    if whole:
        return f"broken JSON ({_reason(error)}); write one complete JSON object a line"
    return f"broken JSON ({_reason(error)}) in a last line without a line end: the file seems cut off; copy it again"


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {list: "an array", str: "a string", bool: "true or false"}.get(type(value), "a number")


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at
