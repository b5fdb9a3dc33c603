"""metrics.csv as series of numbers; lines that are damaged are named and left out."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

Series = dict[str, list[tuple[int, float]]]
"""Column -> (finished optimizer steps, number) in the order of steps, where there is a number."""
SHOWN = 3
"""Lines that are named of each damaged file."""


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
    found, wrong = dict[str, dict[int, float]](), list[str]()
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            _take(line, header, found, wrong, f"{file}:{number}")
    notes += named(file, wrong)
    return {column: sorted(points.items()) for column, points in found.items()}


def _take(line: str, header: list[str], found: dict[str, dict[int, float]], wrong: list[str], place: str) -> None:
    """Add the numbers of one line, or what is wrong with it."""
    cells = next(csv.reader(io.StringIO(line)))
    if len(cells) != len(header):
        wrong.append(f"{place}: {len(cells)} cells where the header has {len(header)}; line skipped")
        return
    row = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
    try:
        step = int(row.pop("step", ""))
        numbers = {column: float(cell) for column, cell in row.items()}
    except ValueError as error:
        wrong.append(f"{place}: not all numbers ({error}); line skipped")
        return
    for column, value in numbers.items():
        if math.isfinite(value):
            found.setdefault(column, {})[step] = value
        else:
            wrong.append(f"{place}: {column} is {value}; number left out")


def named(file: Path, wrong: list[str]) -> list[str]:
    """The first few complaints of a file, and how many more there are."""
    rest = len(wrong) - SHOWN
    return wrong[:SHOWN] + ([f"{file}: {rest} more lines like these"] if rest > 0 else [])
