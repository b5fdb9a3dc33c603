"""The reader of metrics.csv: a series of numbers for each column; damaged lines are named and left out."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

Series = dict[str, list[tuple[int, float]]]
"""Column -> (finished optimizer steps, number) in the order of steps, where there is a number."""
SHOWN = 3
"""Most lines that are named of each damaged file."""


def read_metrics(file: Path, notes: list[str]) -> Series:
    """Read a metrics.csv; empty where there is none. What is wrong with it is added to `notes` as `file:line: …`."""
    if not file.is_file():
        notes.append(f"{file}: missing, so there are no numbers of this run")
        return {}
    lines = file.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff").splitlines(keepends=True)
    header = next(csv.reader(lines[:1]), [])
    if "step" not in header:
        notes.append(f"{file}:1: no column 'step', so nothing in it can be used")
        return {}
    series, problems = dict[str, dict[int, float]](), list[str]()
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            _add_line(line, header, series, problems, f"{file}:{number}")
    notes += named(file, problems)
    return {column: sorted(points.items()) for column, points in series.items()}


def _add_line(
    line: str, header: list[str], series: dict[str, dict[int, float]], problems: list[str], place: str
) -> None:
    """Add the numbers of one line, or the problem with it."""
    cells = next(csv.reader(io.StringIO(line)))
    if len(cells) != len(header):
        problems.append(f"{place}: {len(cells)} cells where the header has {len(header)}; line skipped")
        return
    row = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
    try:
        step = int(row.pop("step", ""))
        numbers = {column: float(cell) for column, cell in row.items()}
    except ValueError as error:
        problems.append(f"{place}: not all numbers ({error}); line skipped")
        return
    for column, value in numbers.items():
        if math.isfinite(value):
            series.setdefault(column, {})[step] = value
        else:
            problems.append(f"{place}: {column} is {value}; number left out")


def named(file: Path, wrong: list[str]) -> list[str]:
    """The first few complaints of a file, and how many more there are."""
    rest = len(wrong) - SHOWN
    return wrong[:SHOWN] + ([f"{file}: {rest} more lines like these"] if rest > 0 else [])
