"""Data files with their kind, format and options, and their rows as examples or row errors, each with its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from leyden.datamodules.files.files import find_files, read_rows
from leyden.datamodules.formats.format import Rows
from leyden.datamodules.formats.formats import describe, detect, format_named, parse
from leyden.datamodules.formats.preference_readers import NO_ORDER, Ranked
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.formats.unpaired_readers import Unpaired
from leyden.errors import UserError
from leyden.example import Example

if TYPE_CHECKING:
    from leyden.data.chat_template import ChatTemplate

HEAD = 100
"""The number of first rows from which the format is detected."""


@dataclass
class Source:
    """Where rows come from and how to read them. Kind None and format `auto` are detected from the first rows.

    Args:
        path: a file, folder, glob or `hf:NAME`.
        kind: instruction, preference, unpaired, prompts or candidates.
        format: a format's name, the path of a `Format` class, or `auto`.
        columns: canonical name -> the file's own column.
        rank_order: how to read a ranking column.
        tokenizer: model folder or hub name; None is the embedded one, if there is one.
        chat_template: None is the tokenizer's own, or `plain`, or another's name, or a Jinja file.
        chat_template_args: what the chat template is given beside the conversation.
        every_label: whether answers that their label calls bad are instructions too, for a class that reads labels.
    """

    path: str
    kind: str | None = None
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    rank_order: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_args: Mapping[str, Any] | None = None
    every_label: bool = False

    def files(self, say: Callable[[str], None] | None = None) -> list[Source]:
        """One source for each file, since the files of a folder may have different formats."""
        if self.path.startswith("hf:"):
            return [self]
        return [replace(self, path=str(file)) for file in find_files(self.path, say)]

    def examples(self, say: Callable[[str], None]) -> tuple[Source, Iterator[tuple[str, Example | RowError | LeftOut]]]:
        """The source with kind and format settled, and an iterator of (`file:line`, example or row error)."""
        bad: list[tuple[str, RowError]] = []
        rows = read_rows(self.path, lambda at, problem: bad.append((at, RowError(problem, "unreadable"))), on_note=say)
        head = list(islice(rows, HEAD))
        settled = self._settle([row for _, row in head], bad)
        if head:
            description = describe([row for _, row in head], settled.format, str(settled.kind), self.columns)
            say(f"{self.path}: {settled.kind} data as {description}")
        return settled, settled._examples(chain(head, rows), bad)

    def template(self, say: Callable[[str], None]) -> ChatTemplate | None:
        """The chat template, or None where no tokenizer is named and there is no embedded one."""
        from leyden.data.chat_template import ChatTemplate
        from leyden.data.tokenizer import load_tokenizer

        try:
            tokenizer = load_tokenizer(self.tokenizer or "tiny")
        except UserError:
            if self.tokenizer is not None:
                raise
            say("no embedded tokenizer here: lengths are in characters; add --tokenizer PATH for tokens")
            return None
        whose = "the embedded one; --tokenizer PATH takes that of your model" if self.tokenizer is None else "as named"
        say(f"tokenizer: {self.tokenizer or 'tiny'} ({whose})")
        return ChatTemplate(tokenizer, self.chat_template, args=self.chat_template_args)

    def _settle(self, rows: list[dict[str, Any]], bad: list[tuple[str, RowError]]) -> Source:
        if not rows:
            first = f" (first: {bad[0][0]}: {bad[0][1]})" if bad else ""
            raise UserError(f"{self.path}: no usable row in it{first}; give a file with data")
        problem: UserError | None = None
        for kind in [self.kind] if self.kind else ["preference", "instruction", "prompts"]:
            try:
                format = detect(rows, kind, self.columns) if self.format == "auto" else self.format
                describe(rows, format, kind, self.columns)  # raises for a format that this kind does not have
                break
            except UserError as error:
                problem = problem or error
        else:
            raise UserError(f"{self.path}: {problem}")
        ordered = self.rank_order is not None or all("rank_order" in row for row in rows)
        form = format_named(format, kind)
        if isinstance(form, Ranked) and kind in ("preference", "unpaired", "instruction") and not ordered:
            raise UserError(f"{self.path}: {NO_ORDER}")  # once for the file, not for each row
        if self.every_label and kind == "instruction" and isinstance(form, Unpaired):
            format = form.reader.name
        return replace(self, kind=kind, format=format)

    def _examples(
        self, rows: Rows, bad: list[tuple[str, RowError]]
    ) -> Iterator[tuple[str, Example | RowError | LeftOut]]:
        form = format_named(self.format, str(self.kind))
        for place, row in form.gather(rows, str(self.kind), self.columns):
            yield from bad  # unreadable lines before this row
            bad.clear()
            try:
                if isinstance(row, RowError):
                    raise row
                example = parse(row, self.format, str(self.kind), self.columns, self.rank_order)
            except RowError as error:
                yield place, error
            except LeftOut as reason:
                yield place, reason
            else:
                example.source = place
                yield place, example
        yield from bad
