"""Where votes are kept: items, people with their tokens, and every vote, in one SQLite file that several may use."""

from __future__ import annotations

import json
import sqlite3
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import RLock
from typing import Any

from leyden.datamodules.annotate.schema import broken, connect
from leyden.errors import UserError
from leyden.language import say
from leyden.votes.vote import Answer, Item, Vote
from leyden.web.guests import hashed, new_token


class Gone(LookupError):
    """A vote for an item that is not there."""


class Used(UserError):
    """A vote whose id another vote has."""


class Full(OSError):
    """The disk has no room for a vote."""


class Store:
    """Items, people and votes in a file. A vote that was added is on the disk, also after a power cut.

    Args:
        file: of the database.
        make: whether it is made where it is missing.

    Raises:
        UserError: see `schema.connect`.
    """

    def __init__(self, file: str | Path, make: bool = True) -> None:
        self.file = Path(file).expanduser()
        self._database = connect(self.file, make)
        self._lock = RLock()
        self._opened = _identity(self.file)
        self._broken: UserError | None = None
        """What is wrong with the file, where it broke while it was open."""
        self._is_lost = False
        """Whether it was told that the file is no longer there."""

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    @property
    def name(self) -> str:
        """8 hex digits that tell this store from others."""
        return str(self._one("SELECT value FROM meta WHERE name = 'store'")[0])

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        with self._told(), self._lock:
            return self._database.execute(query, values).fetchall()

    def first(self, query: str, *values: object, unless: Iterable[int] = ()) -> tuple[Any, ...] | None:
        """The first row of a query whose first column is not among some; only as many are read as it takes."""
        avoided = frozenset(unless)
        with self._told(), self._lock:
            cursor = self._database.execute(query, values)
            try:
                return next((row for row in cursor if row[0] not in avoided), None)
            finally:
                cursor.close()

    def _one(self, query: str, *values: object) -> tuple[Any, ...]:
        row = self.first(query, *values)
        assert row is not None
        return row

    # -- items -------------------------------------------------------------------------------------------------------

    def add_items(self, items: Iterable[Item]) -> int:
        """Add items behind those that are there; one that is there already stays as it is. How many are new."""
        rows = ((one.id, _text(one.messages), _text([asdict(a) for a in one.answers]), spread_of(one)) for one in items)
        text = "INSERT OR IGNORE INTO items (id, messages, answers, spread) VALUES (?, ?, ?, ?)"
        with self._writing() as database:
            before = database.total_changes
            database.executemany(text, rows)
            return database.total_changes - before

    def item(self, place: int) -> Item:
        """The item at a place. Raises `Gone` where there is none."""
        row = self.first("SELECT messages, answers FROM items WHERE place = ?", place)
        if row is None:
            raise Gone(place)
        with self._told():
            return _item(*row)

    def place(self, item: str) -> int:
        """Where an item stands, from 1. Raises `Gone` where it does not."""
        row = self.first("SELECT place FROM items WHERE id = ?", item)
        if row is None:
            raise Gone(item)
        return int(row[0])

    def items(self) -> list[Item]:
        """All items in their order."""
        rows = self.rows("SELECT messages, answers FROM items ORDER BY place")
        with self._told():
            return [_item(*row) for row in rows]

    def remember(self, name: str, value: str) -> None:
        """Keep a text under a name."""
        with self._writing() as database:
            database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"said {name}", value))

    def remembered(self, name: str) -> str | None:
        """The text that is kept under a name."""
        row = self.first("SELECT value FROM meta WHERE name = ?", f"said {name}")
        return None if row is None else str(row[0])

    # -- votes -------------------------------------------------------------------------------------------------------

    def add_vote(self, vote: Vote, id: str) -> bool:
        """Append a vote.

        Args:
            vote: its time may be moved on by a little, so that later votes have later times.
            id: of the vote, made by whoever sends it; one that is there already is not added again.

        Returns:
            Whether it is new.

        Raises:
            Gone: there is no such item.
            Full: the disk is full; nothing was changed.
            Used: another vote, for another item or of someone else, has this id.
            UserError: the ranks are not one for each answer.
        """
        with self._writing() as database:
            known = database.execute(
                "SELECT items.id, person FROM votes JOIN items ON place = item WHERE votes.id = ?", (id,)
            ).fetchone()
            if known is not None:
                if known != (vote.item, vote.person):
                    raise Used("another vote has this id")
                return False
            place = self.place(vote.item)
            if vote.ranks and len(vote.ranks) != len(self.item(place).answers):
                raise UserError("give a rank to each answer")
            last = database.execute("SELECT time FROM votes ORDER BY number DESC LIMIT 1").fetchone()
            later = max(vote.time, last[0] + 1e-3) if last else vote.time  # clocks are set back, too
            told = (json.dumps(vote.ranks), vote.all_bad, vote.reason)
            text = "INSERT INTO votes (id, item, person, time, ranks, all_bad, reason) VALUES (?, ?, ?, ?, ?, ?, ?)"
            number = database.execute(text, (id, place, vote.person, later, *told)).lastrowid
            self._answer(database, place, vote, number)
        return True

    @staticmethod
    def _answer(database: sqlite3.Connection, place: int, vote: Vote, number: int | None) -> None:
        """Let a person's vote be their last one for an item."""
        key, skipped = (vote.person, place), not (vote.ranks or vote.all_bad)
        before = database.execute("SELECT skipped FROM answered WHERE person = ? AND item = ?", key).fetchone()
        database.execute("INSERT OR REPLACE INTO answered VALUES (?, ?, ?, ?)", (*key, skipped, number))
        counted = before is not None and not before[0]
        if counted == skipped:
            change = -1 if skipped else 1
            database.execute("UPDATE items SET votes = votes + ? WHERE place = ?", (change, place))

    def votes(self) -> list[Vote]:
        """Every vote in the order in which they came, skips and those that were replaced later included."""
        query = "SELECT items.id, person, time, ranks, all_bad, reason FROM votes JOIN items ON place = item"
        return [_vote(*row) for row in self.rows(f"{query} ORDER BY number")]

    def vote_before(self, person: str, number: int | None) -> tuple[int, int, Vote] | None:
        """(number, place, vote) of the last vote of a person that is still theirs, before another one's number."""
        query = (
            "SELECT number, place, items.id, person, time, ranks, all_bad, reason "
            "FROM votes JOIN items ON place = item WHERE person = ? AND number < ? AND number = "
            "(SELECT number FROM answered WHERE answered.person = votes.person AND answered.item = place) "
            "ORDER BY number DESC LIMIT 1"
        )
        row = self.first(query, person, 1 << 62 if number is None else number)
        return None if row is None else (row[0], row[1], _vote(*row[2:]))

    def last_vote(self, person: str, place: int) -> Vote | None:
        """The last vote of a person for an item."""
        query = "SELECT id, person, time, ranks, all_bad, reason FROM votes WHERE person = ? AND item = ?"
        row = self.first(f"{query} ORDER BY number DESC LIMIT 1", person, place)
        return None if row is None else _vote(*row)

    def progress(self, person: str) -> dict[str, int]:
        """How many items a person has ranked and skipped, and how many there are."""
        text = "SELECT coalesce(sum(skipped = 0), 0), coalesce(sum(skipped), 0) FROM answered WHERE person = ?"
        done, skipped = self._one(text, person)
        return {"done": done, "skipped": skipped, "total": self._one("SELECT count(*) FROM items")[0]}

    # -- people ------------------------------------------------------------------------------------------------------

    def invite(self, person: str, anew: bool = False) -> str:
        """A token for a person, who need not be known yet.

        Args:
            person: their name.
            anew: whether their other tokens end.
        """
        name, token = person_name(person), new_token()
        with self._writing() as database:
            database.execute("INSERT OR IGNORE INTO people VALUES (?, ?)", (name, time.time()))
            if anew:
                database.execute("DELETE FROM tokens WHERE person = ?", (name,))
            database.execute("INSERT INTO tokens VALUES (?, ?)", (hashed(token), name))
        return token

    def dismiss(self, person: str) -> None:
        """End a person's links; their votes stay. UserError for someone who is not known."""
        if person not in self.people():
            raise UserError(
                f"{self.file}: nobody is called '{person}'; it knows {', '.join(self.people()) or 'nobody'}"
            )
        with self._writing() as database:
            database.execute("DELETE FROM tokens WHERE person = ?", (person,))

    def people(self) -> list[str]:
        """The names of all people."""
        return [row[0] for row in self.rows("SELECT name FROM people ORDER BY since, name")]

    def guests(self) -> list[tuple[str, str]]:
        """(person, hash of a token of theirs) of everyone who has a link."""
        return [(person, token) for person, token in self.rows("SELECT person, hash FROM tokens")]

    # -- the file ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, which is on the disk at its end, or never was."""
        with self._told(), self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
                self._check_place()
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _check_place(self) -> None:
        """Raise `UserError` where the file is no longer at its path: SQLite goes on writing to one that was deleted."""
        if _identity(self.file) == self._opened:
            self._is_lost = False
            return
        error = UserError(
            f"{self.file}: it was deleted, moved or replaced while it was open, so nothing is stored; "
            "put it back, or end this program and start it again"
        )
        if not self._is_lost:
            say(f"error: {error}", file=sys.stderr, flush=True)
        self._is_lost = True
        raise error

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What SQLite says in the words of this program."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                raise Full(str(error)) from error
            raise UserError(f"{self.file}: the database cannot be used now ({error}); try again") from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # a mistake of this program's, not of the file
                raise
            if self._broken is None:  # a copy is made once
                self._broken = broken(self.file, error)
                say(f"error: {self._broken}", file=sys.stderr, flush=True)
            raise self._broken from error


def person_name(typed: str, flag: str = "--people") -> str:
    """A name without blanks around it, and with each Hangul syllable in one piece, as keyboards differ.

    Raises:
        UserError: nothing is left of it, or it is long.
    """
    name = unicodedata.normalize("NFC", typed).strip()
    if not name or len(name) > 80 or not name.isprintable():
        raise UserError(f"{flag} {typed!r}: give a name of 1 to 80 letters")
    return name


def _identity(file: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def spread_of(item: Item) -> float:
    """How far the members of an ensemble are apart on the answer on which they differ most; 0 without one."""
    return max((answer.spread or 0.0 for answer in item.answers), default=0.0)


def _text(value: Sequence[Any]) -> str:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


def _item(messages: str, answers: str) -> Item:
    try:
        return Item(tuple(json.loads(messages)), tuple(Answer(**answer) for answer in json.loads(answers)))
    except (ValueError, TypeError) as error:
        raise sqlite3.DatabaseError(f"an item is damaged: {error}") from error


def _vote(item: str, person: str, when: float, ranks: str, all_bad: int, reason: str) -> Vote:
    return Vote(item, person, when, tuple(json.loads(ranks)), bool(all_bad), reason)
