"""The base class of data formats: a format has the columns that it needs and a pure function that reads a row.

A format of yours is a class in a file of yours, named by its path: `--data.format my_file.MyFormat`, and for
`leyden data` `--format my_file.MyFormat`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from leyden.datamodules.formats.row_error import RowError
from leyden.example import Message

KINDS = ("instruction", "preference", "unpaired", "prompts", "candidates")
"""Kinds that rows can be read as: an answer to train on, responses to compare, answers that are labelled good or bad,
prompts alone, or responses to score."""

Rows = Iterator[tuple[str, dict[str, Any] | RowError]]
"""The rows of a file, each with its place."""


@dataclass
class Parts:
    """The parts of a row: the turns before the answers, and the answers in the order of the row."""

    prompt: list[Message]
    responses: list[list[Message]] = field(default_factory=list)
    worth: list[float] | None = None
    """The worth of each answer, by which they are ranked, higher is better; None where they stand best first."""
    scores: list[float] | None = None
    """The score of each answer, where the row has numbers whose differences mean something."""
    label: bool | None = None
    """Whether the one answer is good, in rows that say so."""
    text: str | None = None
    """Plain text for continued pretraining; then there are no turns."""
    tools: list[dict[str, Any]] | None = None
    """The tools that may be called, as `tools_of` makes them; None for those of the column `tools`."""


class Format(ABC):
    """One way to write a row. Columns have canonical names, see `leyden.datamodules.formats.columns`; others keep their
    own, in lower case."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    """The columns without which a row cannot be read, by canonical names; others are names of the format's own."""
    answers: ClassVar[tuple[str, ...]] = ()
    """Those of `needs` that may be missing where only prompts are read."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Columns that are read where they are there; the line that describes a file names them."""
    unranked: ClassVar[tuple[str, ...] | None] = None
    """The columns that candidates need, which are only scored, if these are fewer than `needs`."""
    kinds: ClassVar[tuple[str, ...]] = ("instruction", "prompts", "candidates")
    """The kinds that its rows can be read as: some of `KINDS`."""

    @abstractmethod
    def read(self, row: dict[str, Any], kind: str) -> Parts:
        """The parts of a row under canonical names. Pure.

        Args:
            row: column -> value.
            kind: one of `kinds`; for `prompts` the answers may be missing, and need not be read.

        Raises:
            RowError: the row cannot be used; it says what is wrong, and what to do.
        """

    def told(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the values of rows, under canonical names, that have the columns it needs are of this format.

        Args:
            rows: of the first rows of a file, those that have the columns.
        """
        return True

    def votes(self, rows: Sequence[Mapping[str, Any]], fitting: int, kind: str, answers: bool) -> int:
        """How many rows speak for this format where it is detected.

        Args:
            rows: the first rows of a file, under canonical names.
            fitting: how many of them have the columns.
            kind: one of `kinds`.
            answers: whether the columns of the answers are among these.
        """
        return fitting

    def gather(self, rows: Rows, kind: str, columns: Mapping[str, str]) -> Rows:
        """The rows of a file as they are read, where several of them make one example. Each stands for what it is made
        of: it has the columns of the first of its rows, and others under names of the format's own.

        Args:
            rows: (`file:line`, row, or what is wrong with it), under the file's own names.
            kind: one of `kinds`.
            columns: canonical name -> column.
        """
        return rows

    def columns(self, kind: str, answers: bool = True) -> tuple[str, ...]:
        """The columns that are needed to read a row as this kind, with or without the answers."""
        needs = self.unranked if kind == "candidates" and self.unranked is not None else self.needs
        return needs if answers else tuple(name for name in needs if name not in self.answers)

    def fits(self, names: Iterable[str], kind: str, answers: bool = True) -> bool:
        """Whether a row with these canonical columns can be read as this kind."""
        return set(self.columns(kind, answers)) <= set(names)
