"""The comparison as a CSV file: one row for each run, for other tools."""

from __future__ import annotations

import csv
import io

from leyden.compare.comparable import identity
from leyden.compare.comparison import Comparison
from leyden.compare.settings import seed
from leyden.evaluation.metrics import Fact

FACTS: tuple[Fact, ...] = ("prompts", "reward", "reference", "text", "sampling", "tokenizer")
FIRST = ("run", "group", "algorithm", "seed", "step")


def as_csv(comparison: Comparison) -> str:
    """The last numbers of each run in every column that some run has. Numbers that must not be compared are there too:
    the columns `of_…` differ where they come from other prompts, another reward and so on."""
    columns = sorted({column for run in comparison.runs for column in run.series})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST, *columns, *(f"of_{fact}" for fact in FACTS), "folder"])
    for group in comparison.groups:
        for run in group.runs:
            first = [run.name, group.name, run.algorithm, seed(run.config), run.steps]
            numbers = ["" if (value := run.final(column)) is None else repr(value) for column in columns]
            writer.writerow([*first, *numbers, *(identity(run, fact)[0] for fact in FACTS), run.folder])
    return text.getvalue()
