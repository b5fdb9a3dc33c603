"""The comparison in the terminal: one table, or several under each other where the terminal is narrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leyden.compare.comparison import Comparison
from leyden.compare.conclusion import conclusion
from leyden.compare.numbers import cells, explained
from leyden.compare.paired import differences
from leyden.evaluation.metrics import Column
from leyden.language import localised

NAME = 30
"""Most letters of a group's name in a line."""
PADDING = 2
GAP = PADDING + 1
"""From one column to the next: after the padding stands a space where other boxes have a line."""


def show(comparison: Comparison, console: Console) -> None:
    """Print the tables of groups and columns, an explanation of the intervals, and the notes."""
    texts = {
        column.column: cells([comparison.value(group, column.column) for group in comparison.groups])
        for column in comparison.columns
    }
    widths = [max(map(cell_len, [column.name, *texts[column.column]])) + GAP for column in comparison.columns]
    names_width = (
        min(NAME, max((cell_len(group.name) for group in comparison.groups), default=0)) + len("runs") + PADDING + GAP
    )
    for columns in _blocks(comparison.columns, widths, console.width - names_width):
        table = Table(box=SIMPLE_HEAD, padding=(0, PADDING, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("", max_width=NAME, overflow="fold")
        table.add_column("runs", justify="right")
        for column in columns:
            table.add_column(column.name, justify="right", no_wrap=True)
        for at, group in enumerate(comparison.groups):
            numbers = [texts[column.column][at] for column in columns]
            table.add_row(Text(group.name), str(len(group.runs)), *numbers)
        console.print(table, "")
    values = [comparison.value(group, column.column) for group in comparison.groups for column in comparison.columns]
    console.print(Text(localised(f"Each run's last number. {explained(values)}".strip())))
    if said := conclusion(comparison):
        console.print(Text(localised(said)))
    for difference in differences(comparison):
        console.print(Text(localised(f"- {difference}")), soft_wrap=not console.is_terminal)
    for note in comparison.notes():
        console.print(Text(localised(f"- {note}")), soft_wrap=not console.is_terminal)


def _blocks(columns: Sequence[Column], widths: Sequence[int], room: int) -> Iterator[list[Column]]:
    """The columns of each table: as many as there is room for, at least one."""
    block, left = list[Column](), room
    for column, width in zip(columns, widths, strict=True):
        if block and width > left:
            yield block
            block, left = [], room
        block.append(column)
        left -= width
    yield block
