"""Read, refused or named: one of the three happens to every column of a row and to every key of its messages.

- *Read*: a format takes it, `row["prompt"]` or `row.get("system")`, and its text is in the prompt, in an answer or in
  what ranks the answers.
- *Refused*: what is taken and cannot be used raises `RowError`.
- *Named*: whatever else has something in it is in `Example.not_read`; `leyden data check`, `show` and training say
  so, once for each file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from leyden.datamodules.formats.columns import CHOICE, is_answer

_NOTED: ContextVar[dict[str, bool] | None] = ContextVar("noted", default=None)
_WORDS = re.compile(r"[^\W\d_]{2,}[,;:]?\s+[^\W\d_]{2,}|[\u3040-\u30ff\u3400-\u9fff]{8,}")
"""Two words of letters, or a run of signs of a language that writes without blanks."""

FLAGS = "weight loss_weight train trained trainable is_trained do_train train_on_turn training loss loss_mask".split()
"""Keys of a message that say whether it is trained on, and are read."""
_LIKE_FLAGS = {*FLAGS, *"mask masked ignore ignored skip train_detail weights loss_weights loss_masks".split()}
"""Columns and keys that may be meant so. What a `mask` of 1 means nobody knows: it is not read as a flag."""
_FLAGGED = ("response", "chosen", "rejected", "text", "system")
"""Names that `leyden data` has a flag for; a second prompt can only be a context."""
_HINT = "\x1f"
"""Stands between a column that is not read and what it could be read as, in names that are noted for `lines` alone."""


class TakenRow(dict[str, Any]):
    """A row under canonical names that remembers which columns were taken from it."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.taken: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.taken.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a column, which counts as taken."""
        self.taken.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:  # defined here so that `dict(row)` and `{**row}` go through `__getitem__`
        return super().__iter__()

    def items(self) -> Any:
        """All columns and their values, which count as taken."""
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        """All values, which count as taken."""
        return {name: self[name] for name in self}.values()


@contextmanager
def noting() -> Iterator[dict[str, bool]]:
    """Collects what `name_the_rest` names within the block: column or key -> whether it holds text."""
    noted: dict[str, bool] = {}
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def name_the_rest(fields: Mapping[str, Any], read: Iterable[str], where: str = "") -> None:
    """Name every field with something in it that is not among those read.

    Args:
        fields: a row, or an object inside it such as a message.
        read: the fields that are read; fields that are refused raise `RowError` before.
        where: what stands before the name of a field, `messages[].` for a message.
    """
    noted, read = _NOTED.get(), set(read)
    if noted is None:
        return
    for name, value in fields.items():
        if name not in read and not is_empty(value):
            noted[f"{where}{name}"] = noted.get(f"{where}{name}", False) or holds_text(value)


def is_empty(value: Any) -> bool:
    """Whether there is nothing in a value: null, blanks, or a list or object of such values."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(item) for item in value)
    return value is None or (isinstance(value, str) and not value.strip()) or value != value  # NaN: an empty cell


def holds_text(value: Any) -> bool:
    """Whether a value holds words, and not only numbers, names, dates or addresses."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(holds_text(item) for item in value)
    return isinstance(value, str) and bool(_WORDS.search(value))


def hint(column: str, reading: str) -> str:
    """A name to note beside a column that is not read: `reading` is the canonical name or the format that reads it."""
    return f"{column}{_HINT}{reading}"


# -- the rows of a file ----------------------------------------------------------------------------------------------


def count(not_read: Mapping[str, bool], counts: dict[str, list[int]]) -> None:
    """Add what is not read of one row to the counts of its file: name -> [rows, rows in which it holds text]."""
    for name, text in not_read.items():
        rows = counts.setdefault(name, [0, 0])
        rows[0] += 1
        rows[1] += text


def lines(counts: Mapping[str, list[int]], kind: str) -> list[str]:
    """What is not read of a file, as few lines: what holds text, with what to type, and the rest."""
    readings = dict(name.rsplit(_HINT, 1) for name in counts if _HINT in name)
    counts = {name: rows for name, rows in counts.items() if _HINT not in name}
    if kind in ("prompts", "candidates"):  # the answers of prompts, and what only rewards look at
        return [f"not in the prompt: {_listed(counts)} (rewards see the whole row)"] if counts else []
    said = _texts({name: rows for name, rows in counts.items() if rows[1]}, readings)
    if rest := {name: rows for name, rows in counts.items() if not rows[1]}:
        said.append(f"not read: {_listed(rest)}")
    for name, reading in readings.items():
        if reading.startswith("unpaired"):
            verdict = f"if '{name}' says which answers are good"
            said.append(f"warning: {verdict}: --format {reading} (training: --data.format)")
            break
    if flags := [name for name in counts if _is_like_flag(name)]:
        said.append(
            f"warning: {', '.join(flags)}: this may be a loss flag, and it is not read; flags are read beside the role "
            f"of a message: {', '.join(FLAGS)}"
        )
    return said


def _texts(text: Mapping[str, list[int]], readings: Mapping[str, str]) -> list[str]:
    """A line for all that holds text and could be read in the same way."""
    ways: dict[str, dict[str, list[int]]] = {}
    for name, rows in text.items():
        ways.setdefault(_way(name, readings), {})[name] = rows
    if "context" in ways:
        ways["context"] |= ways.pop("", {})
    said = []
    for way, names in ways.items():
        column = next(name for name in names if _way(name, readings) == way)
        advice = "is this meant to be left out?"
        if way == CHOICE:
            advice = "if these are the choices of a question, write them into its text"
        elif way:
            aim = "if it belongs to the prompt" if way == "context" else "if it is to be read instead"
            advice = f"{aim}: --{way} '{column}' (training: --data.columns '{{{way}: {column}}}')"
        said.append(f"warning: not read, though there is text in it: {_listed(names)}; {advice}")
    return said


def _way(name: str, readings: Mapping[str, str]) -> str:
    """What to name a column as: the flag without its dashes, `CHOICE`, or nothing where there is no flag for it."""
    reading = readings.get(name, "")
    if reading in (CHOICE, *_FLAGGED):
        return reading
    return "" if "." in name or name == "context" or is_answer(name) else "context"  # no answer into the prompt


def _is_like_flag(name: str) -> bool:
    return name.removeprefix("messages[].").strip().lower() in _LIKE_FLAGS


def _listed(counts: Mapping[str, list[int]]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1][0])
    return ", ".join(f"{name} ({rows:,} {'row' if rows == 1 else 'rows'})" for name, (rows, _) in ordered)
