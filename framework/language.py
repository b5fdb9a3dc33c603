"""Messages in the reader's language: what is printed is looked up in a catalogue of whole messages.

The code says everything in English, in the place where it is true, and an exception holds English for whoever reads it
in Python. The terminal is where a message becomes Korean: `messages.ko.json` has the English template of a message,
with `{}` for what changes, and the Korean one, with `{0}`, `{1}` for the same in the order in which Korean wants them.
`python tests/messages.py` lists the templates of the code that have no translation yet.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache, partial
from importlib import resources
from typing import Any

LANGUAGES = ("en", "ko")
MARKS = ("error:", "warning:", "note:")
"""What stands before a message and is no part of it."""


def language() -> str:
    """`$LEYDEN_LANG`, or else that of the locale where messages are in it; English where neither is known."""
    names = ("LEYDEN_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    name = next((value for value in map(os.environ.get, names) if value), "")
    return next((known for known in LANGUAGES if re.match(rf"{known}\b|{known}_", name)), "en")


def localised(text: str, into: str = "") -> str:
    """A message in the reader's language, or `into` that of whoever reads a page, line by line; what has no translation
    stays as it is.

    A message may be a template within another, such as a place and a colon before it, or a hint that ends it: what
    stands at a `{}` is looked up as well.
    """
    if (into or language()) != "ko" or not text:
        return text
    return "\n".join(_line(line) for line in text.split("\n"))


def say(text: str, **where: Any) -> None:
    """Print a message in the reader's language. `where` is as for `print`."""
    print(localised(text), **where)


def _line(text: str) -> str:
    body = text.strip()
    if not re.search(r"[A-Za-z]{2}", body):
        return text
    start = len(text) - len(text.lstrip())
    return text[:start] + _translated(body) + text[start + len(body) :]


def _translated(text: str) -> str:
    """The translation by the template that says most itself: of the whole text, or of what follows a place."""
    mark = next((mark for mark in MARKS if text.startswith(f"{mark} ")), "")
    if mark:
        return f"{messages()[mark]} {_translated(text.removeprefix(mark).lstrip())}"
    length, best = _whole(text) or (0, text)
    for colon in re.finditer(": ", text):
        place, message = text[: colon.start()], text[colon.end() :]
        if message.startswith(MARKS):
            return f"{_translated(place)}: {_translated(message)}"
        tail = _whole(message)
        if tail is not None and tail[0] > length:
            length, best = tail[0], f"{_translated(place)}: {tail[1]}"
    return best if length else _listed(text)


def _listed(text: str) -> str:
    """A list, piece by piece, such as reasons with their counts; the text itself where it is none."""
    if " · " in text:
        return " · ".join(map(_translated, text.split(" · ")))
    if counted := re.fullmatch(r"([\d,]+) (\D[^,]*)", text):
        reason = _translated(counted[2])
        return f"{reason} {counted[1]}" if reason != counted[2] else text
    pieces = text.split(", ")
    if len(pieces) == 1:
        return text
    translated = [_translated(piece) for piece in pieces]
    return ", ".join(translated) if not set(translated) & set(pieces) else text


def _whole(text: str) -> tuple[int, str] | None:
    """How much a template says itself that matches a text from end to end, and the translation by it."""
    for length, longest, pattern, korean in _catalogue():
        if longest in text and (match := re.fullmatch(pattern, text, re.DOTALL)):
            return length, re.sub(r"('?)\{(\d)\}", partial(_put, match), korean)
    return None


def _put(match: re.Match[str], field: re.Match[str]) -> str:
    """What stood at a `{}`: a message itself, or a name, number or path as it is, which quotes always hold."""
    quote, text = field[1], str(match[int(field[2]) + 1])
    return quote + (_line(text) if not quote and (" " in text or text in _words()) else text)


@cache
def messages() -> Mapping[str, str]:
    """English template -> Korean template."""
    text = resources.files("leyden").joinpath("messages.ko.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@cache
def _words() -> frozenset[str]:
    return frozenset(english for english in messages() if " " not in english)


@cache
def _catalogue() -> list[tuple[int, str, str, str]]:
    """(length of its own text, longest part of it, pattern, Korean) of each template, the wordiest first."""
    rows = []
    for english, korean in messages().items():
        parts = [part.strip("\n") for part in english.strip().split("{}")]
        # a few letters would match half of what there is: what stands in such a template has no blanks
        changing = "(.*?)" if len(re.findall("[A-Za-z]", english)) >= 4 else r"(\S*?)"
        pattern = changing.join(map(re.escape, parts))
        rows.append((sum(map(len, parts)), max(parts, key=len), pattern, korean.strip()))
    return sorted(rows, key=lambda row: -row[0])
