"""The cache of a judge's verdicts on disk: no grade is paid for twice. Processes may share a file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from leyden.errors import UserError

_TABLE = "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL, answer TEXT NOT NULL)"
_MANY = 500
"""Keys in one query: SQLite takes no more than 999."""


class Verdict(NamedTuple):
    """A score, and the answer of the judge that it was read from."""

    score: float
    answer: str


class Verdicts:
    """Verdicts by key in an SQLite file; use as a context. Verdicts given to `keep` are on disk when it returns.

    Raises:
        UserError: the file cannot be used.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with self._user_errors():
            file.parent.mkdir(parents=True, exist_ok=True)
            self._data = sqlite3.connect(file, timeout=60)  # seconds: others may hold the file for a while
        with self._user_errors(), self._data:
            self._data.execute(_TABLE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def known(self, keys: Iterable[str]) -> dict[str, float]:
        """The scores of those keys that have one."""
        distinct, scores = sorted(set(keys)), dict[str, float]()
        with self._user_errors():
            for first in range(0, len(distinct), _MANY):
                chunk = distinct[first : first + _MANY]
                marks = ", ".join("?" * len(chunk))
                scores |= dict(self._data.execute(f"SELECT key, score FROM verdicts WHERE key IN ({marks})", chunk))
        return scores

    def keep(self, verdicts: Mapping[str, Verdict]) -> None:
        """Store verdicts, all at once: waiting for the disk is what takes time."""
        rows = [
            (key, score, answer.encode("utf-8", "replace").decode("utf-8"))  # halves of characters cannot be stored
            for key, (score, answer) in verdicts.items()
        ]
        if rows:
            with self._user_errors(), self._data:
                self._data.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", rows)

    @contextmanager
    def _user_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"{self.file}: the judge's cache cannot be used ({error}); name another file as its `cache`"
            ) from error
