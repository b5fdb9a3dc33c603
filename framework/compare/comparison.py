"""Runs beside each other: one number with its interval for each group and measure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from leyden.compare.comparable import Refusal, merged, split
from leyden.compare.groups import SeedGroup, doubts, grouped
from leyden.compare.intervals import Interval, over_prompts, over_seeds
from leyden.compare.measures import COLUMNS, column_named
from leyden.compare.run import RunFiles
from leyden.errors import UserError, nearest
from leyden.evaluation.metrics import Column, Fact


@dataclass
class Comparison:
    """Groups of runs, the columns they are compared by, and what cannot be compared.

    Args:
        groups: the best by the first measure first.
        columns: in the order of tables.
        compared: column -> runs that can be compared by it.
        refusals: who is left out of what, and why.
    """

    groups: list[SeedGroup]
    columns: list[Column]
    compared: dict[str, list[RunFiles]]
    refusals: list[Refusal] = field(default_factory=list)

    @cached_property
    def runs(self) -> list[RunFiles]:
        return [run for group in self.groups for run in group.runs]

    def members(self, group: SeedGroup, column: str) -> list[RunFiles]:
        """A group's runs that can be compared by a column."""
        return [run for run in group.runs if run in self.compared.get(column, ())]

    def value(self, group: SeedGroup, column: str) -> Interval | None:
        """A group's last number of a column: over its seeds, or of its one run with what is known within it."""
        runs = self.members(group, column)
        values = [value for run in runs if (value := run.final(column)) is not None]
        if len(values) > 1:
            return over_seeds(values)
        return _within(runs[0], column, values[0]) if values else None

    def notes(self) -> list[str]:
        """All that a reader has to know beside the numbers, one sentence each."""
        found = [f"Not compared. {refusal}." for refusal in self.refusals]
        without = [run.name for run in self.runs if not run.evaluated]
        if without:
            found.append(
                f"Without evaluation: {', '.join(without)}. To have one, add --config eval --eval.path PROMPTS "
                "--eval.reward REWARD to leyden fit."
            )
        found += [f"{doubt}." for doubt in doubts(self.groups)]
        return found + [f"{note}." for run in self.runs for note in run.notes]


def _within(run: RunFiles, column: str, value: float) -> Interval:
    """One run's number, with the interval over its prompts where the run has measured that."""
    error, low, high = (run.final(f"{column}_{end}") for end in ("se", "low", "high"))
    if error is not None:
        return over_prompts(value, error)
    if low is not None and high is not None:
        return Interval(value, low, high, "prompts")
    return Interval(value, value, value)


def compare(runs: Sequence[RunFiles], asked: Sequence[str] = (), ignored: Iterable[str] = ()) -> Comparison:
    """Compare runs by the measures that are asked for, or by all usual ones that some run has.

    Raises:
        UserError: no run has a measure that is asked for.
    """
    known = (*COLUMNS, *declared(runs))
    wanted = [column_named(name, known) for name in _columns(runs, asked, known)]
    compared, refusals, shown = dict[str, list[RunFiles]](), list[Refusal](), list[Column]()
    for one in dict.fromkeys([*wanted, *known]):
        kept, refused = split(runs, one)
        compared[one.column] = kept
        if one in wanted and not (one.asked and refused and not asked):
            shown.append(one)
            refusals += refused
    found = Comparison(grouped(runs, ignored), shown, compared, merged(refusals))
    if shown:
        found.groups.sort(key=lambda group: _rank(found.value(group, shown[0].column), shown[0]))
    return found


def declared(runs: Sequence[RunFiles]) -> list[Column]:
    """The columns of measures of the user's own, as the runs' evaluation.json describes them; what is damaged is
    shown under its plain name."""
    columns: dict[str, Column] = {}
    for run in runs:
        for said in (run.facts or {}).get("columns") or ():
            if not isinstance(said, dict) or not isinstance(said.get("column"), str):
                continue
            plain = column_named(said["column"])
            needs = tuple(fact for fact in said.get("needs") or () if fact in get_args(Fact))
            best: Literal["most", "least"] = "least" if said.get("best") == "least" else "most"
            name, unit = str(said.get("name") or plain.name), str(said.get("unit") or "")
            columns.setdefault(plain.column, Column(plain.column, name, unit, needs, best))
    return [column for name, column in columns.items() if name not in {known.column for known in COLUMNS}]


def _columns(runs: Sequence[RunFiles], asked: Sequence[str], known: Sequence[Column]) -> list[str]:
    """Columns by their names, with or without `eval/` and its kind."""
    there = sorted({column for run in runs for column in run.series}, key=lambda name: not name.startswith("eval/"))
    if not asked:
        return [column.column for column in known if column.column in there]
    short = {name: column for column in reversed(there) for name in (column.rpartition("/")[2], column)}
    for name in asked:
        if name not in short:
            hint = nearest(name, short) or f"; there are {', '.join(there) or 'none'}"
            raise UserError(f"--metric {name}: no run has it{hint}")
    return [short[name] for name in asked]


def _rank(value: Interval | None, by: Column) -> tuple[bool, float]:
    if value is None:
        return True, 0.0
    return False, value.mean if by.best == "least" else -value.mean
