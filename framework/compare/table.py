"""The comparison in the terminal: as many tables as its width asks for, under each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leyden.compare.comparison import Comparison
from leyden.compare.numbers import cell, explained
from leyden.evaluation.metrics import Column

NAME = 30
"""Most letters of a group's name in a line."""
PADDING = 2
GAP = PADDING + 1
"""From one column to the next: after the padding stands a space where other boxes have a line."""


def show(found: Comparison, console: Console) -> None:
    """Print the groups by the measures, what the intervals are, and what has to be known beside them."""
    cells = {one.column: [cell(found.value(group, one.column)) for group in found.groups] for one in found.columns}
    widths = [max(map(cell_len, [one.name, *cells[one.column]])) + GAP for one in found.columns]
    taken = min(NAME, max((cell_len(group.name) for group in found.groups), default=0)) + len("runs") + PADDING + GAP
    for columns in _blocks(found.columns, widths, console.width - taken):
        table = Table(box=SIMPLE_HEAD, padding=(0, PADDING, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("", max_width=NAME, overflow="fold")
        table.add_column("runs", justify="right")
        for one in columns:
            table.add_column(one.name, justify="right", no_wrap=True)
        for at, group in enumerate(found.groups):
            numbers = [cells[one.column][at] for one in columns]
            table.add_row(Text(group.name), str(len(group.runs)), *numbers)
        console.print(table, "")
    values = [found.value(group, one.column) for group in found.groups for one in found.columns]
    console.print(Text(f"Each run's last number. {explained(values)}".strip()))
    for note in found.notes():
        console.print(Text(f"- {note}"), soft_wrap=not console.is_terminal)


def _blocks(columns: Sequence[Column], widths: Sequence[int], room: int) -> Iterator[list[Column]]:
    """Columns by tables: as many in one as there is room for, at least one."""
    block, left = list[Column](), room
    for one, width in zip(columns, widths, strict=True):
        if block and width > left:
            yield block
            block, left = [], room
        block.append(one)
        left -= width
    yield block
