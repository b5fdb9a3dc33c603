"""Where the texts of a conversation stand in what a chat template writes of it, so that none is lost unseen.

A template is a program: it may leave a turn out, cut it or rewrite it. So the conversation is rendered a second time,
with a private character in the place of every text. Where both results are the same but for these, each character shows
exactly where its text stands, or that it stands nowhere::

    <|user|>Hello?</s><|assistant|>Bonjour.</s>
    <|user|>①</s><|assistant|>②</s>

Templates look for tags in a text (`</think>`). Where that makes a difference, tags stay and only what stands between
them is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from leyden.errors import RowError
from leyden.example import Message

Span = tuple[int, int]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]]], str]
"""Turns and tools to the text that a chat template writes."""

_BLOCK = 0x4000
_BLOCKS = range(0xF0000, 0x10C000, _BLOCK)
"""First characters of the blocks of private ones. A block is taken that no text has a character of."""
_TAG = re.compile(r"(<[^<>\s]+>)")
_CLOSING = re.compile(r"</[^<>\s]+>")
_SPOKEN = ("name", "description")
"""Keys of a tool's schema whose texts are for the model; others are the schema's own words."""


@dataclass
class Part:
    """A text of a conversation."""

    turn: int
    """Index of its turn; -1 for the tools"""
    what: str
    """content, reasoning, name, tool call or tool"""
    text: str
    """Without the blanks around it, which templates may trim"""
    tail: str = ""
    """What follows it in its turn's content and is not looked for: blanks and tags"""
    spans: list[Span] = field(default_factory=list)
    """Where it stands in the rendered conversation"""


def parts_of(render: Render, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str) -> list[Part]:
    """Every text of the turns and tools, with the places where it stands in `text`, which is what `render` makes of
    them. A part without spans stands nowhere."""
    parts: list[Part] = []
    private = {ord(character) // _BLOCK * _BLOCK for character in text if ord(character) >= _BLOCKS[0]}
    first = next((block for block in _BLOCKS if block not in private), None)
    if first is None:
        raise RowError(
            "it has private characters (U+F0000 and on) of every kind; clean its texts", "private characters"
        )
    for by_tags in (False, True):
        marks = _Marks(by_tags, first)
        marked_turns, marked_tools = [marks.turn(i, turn) for i, turn in enumerate(turns)], marks.tools(tools)
        parts = parts or marks.parts
        try:
            if _align(render(marked_turns, marked_tools), text, marks.parts, first):
                return [*marks.parts, *(tag for tag in marks.tags if tag.text not in text)]
        except RowError:  # the template takes the texts apart
            pass
    # what the template writes depends on the words, or changes them: each must stand in it as it is written
    _find(parts, text)
    return parts


def _find(parts: Sequence[Part], text: str) -> None:
    """Look for each part as it is written, between those before and after it, or in another form anywhere. The longest
    come first: a short one must not be found within another, where it only seems to stand."""
    taken: list[Span] = []
    for number in sorted(range(len(parts)), key=lambda number: -len(parts[number].text)):
        part = parts[number]
        begin = max((before.spans[0][1] for before in parts[:number] if before.spans), default=0)
        end = min((after.spans[0][0] for after in parts[number + 1 :] if after.spans), default=len(text))
        tries = [(part.text, begin, end), *((form, 0, len(text)) for form in _forms(part.text))]
        found = (_free(text, words, first, last, taken) for words, first, last in tries)
        part.spans = [span for span in found if span is not None][:1]
        taken += part.spans


def _free(text: str, words: str, begin: int, end: int, taken: Sequence[Span]) -> Span | None:
    """The first place of `words` that no other part has taken."""
    while (found := text.find(words, begin, end)) >= 0:
        span = (found, found + len(words))
        if not any(start < span[1] and found < stop for start, stop in taken):
            return span
        begin = found + 1
    return None


class _Marks:
    """Puts private characters in the place of texts."""

    def __init__(self, by_tags: bool, first: int) -> None:
        self.by_tags, self.parts = by_tags, list[Part]()
        self.tags: list[Part] = []
        """The tags that stay, but for those around an assistant's reasoning, which go with it"""
        self._marks = map(chr, count(first))

    def turn(self, index: int, turn: Message) -> Message:
        marked = turn.copy()
        if reasoning := turn.get("reasoning_content"):
            marked["reasoning_content"] = self._put(index, "reasoning", reasoning)
        if not turn.get("tool_calls") or turn["content"].strip():
            marked["content"] = self._content(index, turn["content"], turn["role"])
        if calls := turn.get("tool_calls"):
            marked["tool_calls"] = [
                {**call, "function": self._deep(index, "tool call", call["function"], 1)} for call in calls
            ]
        if name := turn.get("name"):
            marked["name"] = self._put(index, "name", name)
        return marked

    def tools(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self._schema(dict(tool)) for tool in tools]

    def _content(self, index: int, content: str, role: str) -> str:
        if not self.by_tags:
            return self._put(index, "content", content)
        pieces, end, begins = _TAG.split(content), 0, content.lstrip().startswith("<")
        for number, piece in enumerate(pieces):
            reasoning = role == "assistant" and bool(_CLOSING.search(content, end + len(piece) * (number % 2 == 0)))
            end += len(piece)
            if number % 2 and not (reasoning and begins):
                self.tags.append(Part(index, "content", piece))
            elif number % 2 == 0 and piece.strip():
                pieces[number] = self._put(index, "reasoning" if reasoning else "content", piece)
                self.parts[-1].tail += content[end:]
        return "".join(pieces)

    def _put(self, index: int, what: str, text: str) -> str:
        words = text.strip()
        before, _, after = text.partition(words) if words else ("", "", text)
        self.parts.append(Part(index, what, words, after))
        return before + next(self._marks) + after

    def _deep(self, index: int, what: str, value: Any, names: int = 0) -> Any:
        """A copy with every text in it replaced; the first `names` levels of an object keep their keys."""
        if isinstance(value, Mapping):
            return {
                key if names else self._put(index, what, str(key)): self._deep(index, what, item, max(names - 1, 0))
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._deep(index, what, item) for item in value]
        return self._put(index, what, value) if isinstance(value, str) and value.strip() else value

    def _schema(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key: self._put(-1, "tool", item)
                if key in _SPOKEN and isinstance(item, str) and item.strip()
                else self._schema(item)
                for key, item in value.items()
            }
        return [self._schema(item) for item in value] if isinstance(value, list) else value


def _align(marked: str, text: str, parts: Sequence[Part], first: int) -> bool:
    """Whether `text` is `marked` with the parts in the place of their characters, which begin with `first`; notes where
    each of them stands."""
    at = 0
    for number, piece in enumerate(re.split(f"([{chr(first)}-{chr(first + _BLOCK - 1)}])", marked)):
        part = parts[ord(piece) - first] if number % 2 else None
        form = next((form for form in (_forms(part.text) if part else (piece,)) if text.startswith(form, at)), None)
        if form is None:
            return False
        if part is not None:
            part.spans.append((at, at + len(form)))
        at += len(form)
    return at == len(text)


def _forms(text: str) -> tuple[str, ...]:
    """A text as it is, and as JSON writes it."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1]
