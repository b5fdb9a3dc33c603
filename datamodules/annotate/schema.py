"""The database of votes: its tables, and how a file becomes an open database or one line that says why not."""

from __future__ import annotations

import filecmp
import secrets
import shutil
import sqlite3
from itertools import count
from pathlib import Path

from leyden.errors import UserError

MARK, VERSION = 0x4C565445, 1
"""What SQLite's header says of whose database it is ("LVTE"), and the version of the tables."""
TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, messages TEXT NOT NULL, answers TEXT NOT NULL,
    spread REAL NOT NULL, votes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX least ON items (votes, place);
CREATE INDEX disagreement ON items (spread DESC, votes, place);
CREATE TABLE people (name TEXT PRIMARY KEY, since REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE tokens (hash TEXT PRIMARY KEY, person TEXT NOT NULL REFERENCES people) WITHOUT ROWID;
CREATE TABLE votes (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, item INTEGER NOT NULL REFERENCES items,
    person TEXT NOT NULL REFERENCES people, time REAL NOT NULL, ranks TEXT NOT NULL, all_bad INTEGER NOT NULL,
    reason TEXT NOT NULL
);
CREATE INDEX of_person ON votes (person, number);
CREATE TABLE answered (
    person TEXT NOT NULL, item INTEGER NOT NULL, skipped INTEGER NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY (person, item)
) WITHOUT ROWID;
"""
"""`votes` is what happened, and only grows. `answered` (the last vote of each person for each item) and `items.votes`
(people who did not skip it) follow from it, and are changed in the same transaction."""


def connect(file: Path, make: bool) -> sqlite3.Connection:
    """An open database.

    Args:
        file: of it.
        make: whether a missing file is made.

    Raises:
        UserError: it is missing, cannot be written, is of another program, or is damaged, of which a copy is kept.
    """
    _check(file, make)
    try:
        connection = sqlite3.connect(file, timeout=10, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = FULL")  # a vote that was confirmed outlives a power cut
        connection.execute("PRAGMA foreign_keys = ON")
        _make(connection)
        _prove(connection)  # before the first change of a file that may be someone else's
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        raise UserError(f"{file}: cannot be opened ({error}); make room, or name another --store") from None
    except sqlite3.DatabaseError as error:
        raise broken(file, error) from None
    return connection


def _check(file: Path, make: bool) -> None:
    """What the first bytes of a file say, before SQLite changes anything in it."""
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent}; make it, or name another --store")
    if file.is_dir():
        raise UserError(f"{file}: a folder; name a file, such as {file / 'votes.db'}")
    if not file.exists():
        if not make:
            raise UserError(f"{file}: no such file; give the database that leyden annotate serve --store has made")
        return
    try:
        with file.open("rb") as stream:
            head = stream.read(100)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name another --store") from None
    if not head:
        return  # made and never written to
    if not head.startswith(b"SQLite format 3\0") or len(head) < 100:
        raise broken(file, "no SQLite database")
    if (mark := int.from_bytes(head[68:72], "big")) not in (0, MARK):
        raise broken(file, f"another program's database, 0x{mark:08x}")


def _make(connection: sqlite3.Connection) -> None:
    """Make the tables where there are none."""
    connection.execute("BEGIN IMMEDIATE")
    (mark,), (tables,) = (
        connection.execute(text).fetchone() for text in ("PRAGMA application_id", "SELECT count(*) FROM sqlite_master")
    )
    if mark == 0 and tables == 0:
        for statement in TABLES.split(";"):
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('store', ?)", (secrets.token_hex(4),))
        connection.execute(f"PRAGMA application_id = {MARK}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _prove(connection: sqlite3.Connection) -> None:
    """Raise `DatabaseError` where a database is not this program's, or the pages of its votes are damaged."""
    (mark,), (version,) = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    if mark != MARK:
        raise sqlite3.DatabaseError("another program's tables")
    if version != VERSION:
        raise sqlite3.DatabaseError(f"version {version} of the tables, and this Leyden knows {VERSION}")
    for table in ("votes", "people", "tokens", "answered"):
        (said,) = connection.execute(f"PRAGMA quick_check({table})").fetchone()
        if said != "ok":
            raise sqlite3.DatabaseError(said.splitlines()[-1])
    connection.execute("SELECT place, id, spread, votes FROM items LIMIT 1").fetchone()


def broken(file: Path, reason: object) -> UserError:
    """The error of a file that is no usable database. A copy of one with votes is kept, once as it is now."""
    with file.open("rb") as stream:
        mark = int.from_bytes(stream.read(72)[68:], "big")
    if mark != MARK:
        return UserError(f"{file}: no database of votes ({reason}); name another --store")
    copies = (file.with_name(f"{file.name}.broken-{number}") for number in count(1))
    copy = next(one for one in copies if not one.exists() or filecmp.cmp(one, file, shallow=False))
    try:
        if not copy.exists():
            shutil.copy2(file, copy)
            for ending in ("-wal", "-shm"):
                if (beside := file.with_name(file.name + ending)).exists():
                    shutil.copy2(beside, copy.with_name(copy.name + ending))
        kept = f"a copy is kept as {copy.name}"
    except OSError as error:
        kept = f"it could not be copied ({error.strerror}) and stays as it is"
    return UserError(f"{file}: no usable database of votes ({reason}); {kept}; name another --store")
