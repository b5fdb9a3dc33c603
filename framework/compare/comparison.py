"""The comparison of runs: one number with its confidence interval for each group and column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from leyden.compare.benchmarks import benchmark_columns
from leyden.compare.comparable import Refusal, merged, split
from leyden.compare.groups import SeedGroup, doubts, grouped
from leyden.compare.intervals import Interval, over_prompts, over_seeds
from leyden.compare.measures import COLUMNS, TRAINING, column_named
from leyden.compare.run import RunFiles
from leyden.errors import UserError, nearest
from leyden.evaluation.metrics import Column, Fact


@dataclass
class Comparison:
    """Groups of runs, the columns they are compared by, and what cannot be compared.

    Args:
        groups: ordered by the first column, the best first.
        columns: in the order of tables.
        compared: column -> runs that can be compared by it.
        refusals: who is left out of what, and why.
        remarks: further notes, without their full stops.
    """

    groups: list[SeedGroup]
    columns: list[Column]
    compared: dict[str, list[RunFiles]]
    refusals: list[Refusal] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @cached_property
    def runs(self) -> list[RunFiles]:
        return [run for group in self.groups for run in group.runs]

    def members(self, group: SeedGroup, column: str) -> list[RunFiles]:
        """A group's runs that can be compared by a column."""
        return [run for run in group.runs if run in self.compared.get(column, ())]

    def value(self, group: SeedGroup, column: str) -> Interval | None:
        """A group's last number of a column: the mean over its seeds, or of a single run the number with the interval
        over prompts. None where no run has it."""
        runs = self.members(group, column)
        values = [value for run in runs if (value := run.final(column)) is not None]
        if len(values) > 1:
            return over_seeds(values)
        return _one_run(runs[0], column, values[0]) if values else None

    def notes(self) -> list[str]:
        """Notes for the reader of the numbers, one sentence each."""
        sentences = [f"Not compared. {refusal}." for refusal in self.refusals]
        unevaluated = [run.name for run in self.runs if not run.evaluated and (run.config or not run.benchmarks)]
        if unevaluated:
            sentences.append(
                f"Without evaluation: {', '.join(unevaluated)}. To have one, add --config eval --eval.path PROMPTS "
                "--eval.reward REWARD to leyden fit."
            )
        sentences += [f"{doubt}." for doubt in doubts(self.groups)]
        return sentences + [f"{note}." for note in [*self.remarks, *(note for run in self.runs for note in run.notes)]]


def _one_run(run: RunFiles, column: str, value: float) -> Interval:
    """One run's number, with the interval over its prompts where the run has measured that."""
    error, low, high = (run.final(f"{column}_{end}") for end in ("se", "low", "high"))
    if error is not None:
        return over_prompts(value, error)
    if low is not None and high is not None:
        return Interval(value, low, high, "prompts")
    return Interval(value, value, value)


def compare(runs: Sequence[RunFiles], asked: Sequence[str] = (), ignored: Iterable[str] = ()) -> Comparison:
    """Compare runs by the columns in `asked`, or by all usual ones that some run has.

    Raises:
        UserError: no run has a column that is asked for.
    """
    shown, others = benchmark_columns(run.benchmarks for run in runs)
    answers = [column for column in COLUMNS if column.column.startswith("eval/")]
    usual = tuple(dict.fromkeys((*answers, *shown, *COLUMNS, *declared(runs))))
    all_columns = (*usual, *others)
    requested = [column_named(name, all_columns) for name in _columns(runs, asked, usual)]
    compared, refusals, columns = dict[str, list[RunFiles]](), list[Refusal](), list[Column]()
    for column in dict.fromkeys([*requested, *all_columns, *TRAINING]):
        comparable, refused = split(runs, column)
        compared[column.column] = comparable
        if column in requested and not (column.asked and refused and not asked):
            columns.append(column)
            refusals += refused
    comparison = Comparison(grouped(runs, ignored), columns, compared, merged(refusals))
    if columns:
        comparison.groups.sort(key=lambda group: _rank(comparison.value(group, columns[0].column), columns[0]))
    return comparison


def declared(runs: Sequence[RunFiles]) -> list[Column]:
    """The columns of measures of the user's own, as the runs' evaluation.json describes them; what is damaged is
    shown under its plain name."""
    columns: dict[str, Column] = {}
    for run in runs:
        descriptions = (run.facts or {}).get("columns")
        for description in descriptions if isinstance(descriptions, list) else ():
            if not isinstance(description, dict) or not isinstance(description.get("column"), str):
                continue
            plain = column_named(description["column"])
            needed = description.get("needs")
            needs = tuple(fact for fact in get_args(Fact) if isinstance(needed, list) and fact in needed)
            best: Literal["most", "least"] = "least" if description.get("best") == "least" else "most"
            name, unit = str(description.get("name") or plain.name), str(description.get("unit") or "")
            columns.setdefault(plain.column, Column(plain.column, name, unit, needs, best))
    return [column for name, column in columns.items() if name not in {known.column for known in COLUMNS}]


def _columns(runs: Sequence[RunFiles], asked: Sequence[str], known: Sequence[Column]) -> list[str]:
    """The columns in `asked`, which may leave out `eval/` and its kind; by default all known ones that a run has."""
    present = sorted({column for run in runs for column in run.series}, key=lambda name: not name.startswith("eval/"))
    if not asked:
        return [column.column for column in known if column.column in present]
    columns_by_name = {name: column for column in reversed(present) for name in (column.rpartition("/")[2], column)}
    for name in asked:
        if name not in columns_by_name:
            hint = nearest(name, columns_by_name) or f"; there are {', '.join(present) or 'none'}"
            raise UserError(f"--metric {name}: no run has it{hint}")
    return [columns_by_name[name] for name in asked]


def _rank(value: Interval | None, by: Column) -> tuple[bool, float]:
    if value is None:
        return True, 0.0
    return False, value.mean if by.best == "least" else -value.mean
