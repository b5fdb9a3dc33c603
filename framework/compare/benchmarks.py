"""The results of `leyden benchmark` in a run's folder, as columns that are compared where tasks were asked alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leyden.compare.influence import influences
from leyden.compare.metrics import Series
from leyden.compare.records import Row, read_object
from leyden.evaluation.metrics import Column, Fact

FILE, PREFIX = "benchmark.json", "benchmark/"
NEEDS: tuple[Fact, ...] = ("task", "template", "examples", "questions")
"""What two results must share to be compared."""


@dataclass(frozen=True)
class Result:
    """One measure of a task or group.

    Args:
        value: the measure.
        error: its standard error over questions; None where it is not known.
        best: whether more or less of it is better.
        unit: what it is, in a few words.
        shown: whether it is in the table unless it is asked for: the first measure of a task that is in no group.
        identity: fact -> what must be equal, and its name.
        parts: (weight, influence of each question) by task; of a single task one. Empty where they are not known.
    """

    value: float
    error: float | None
    best: str
    unit: str
    shown: bool
    identity: Mapping[str, tuple[str, str]]
    parts: Sequence[tuple[float, Sequence[float]]] = field(default=(), repr=False)


def read_benchmarks(folder: Path, notes: list[str]) -> dict[str, Result]:
    """Column -> result, in the order of the file: of each task its first measure as `benchmark/TASK`, and every other
    as `benchmark/TASK/MEASURE`. What cannot be read is named in `notes`."""
    content = read_object(folder / FILE, notes) or {}
    found: dict[str, Result] = {}
    tasks = content.get("tasks")
    tasks = tasks if isinstance(tasks, dict) else {}
    groups = content.get("groups")
    for kind in (groups if isinstance(groups, dict) else {}, tasks):
        for name, record in kind.items():
            try:
                found |= _results(name, record, tasks)
            except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
                notes.append(f"{folder / FILE}: {name} is damaged ({type(error).__name__}: {error}); left out")
    return found


def _results(name: str, record: Row, tasks: Mapping[str, Row]) -> dict[str, Result]:
    leaves = [tasks[leaf] for leaf in record.get("tasks", ())] or [record]
    identity = _identity(record, leaves)
    found = {}
    for metric, one in record["metrics"].items():
        first = metric == record["metric"]
        column = f"{PREFIX}{name}" if first else f"{PREFIX}{name}/{metric}"
        found[column] = Result(
            float(one["value"]),
            None if one["error"] is None else float(one["error"]),
            str(one["best"]),
            f"{metric} over {record['questions']:,} questions",
            first and not record.get("group"),
            identity,
            _parts(metric, one["kind"], leaves),
        )
    return found


def _identity(record: Row, leaves: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """What must be equal, and how it is called. Of a group: that of all its tasks."""

    def of(key: str, *more: str) -> str:
        values = [[leaf.get(one) for one in (key, *more)] for leaf in leaves]
        return hashlib.sha256(repr(values).encode()).hexdigest()[:16]

    task, documents = of("version", "task"), of("documents")
    templates = {str(leaf["template"] or "none")[:8] for leaf in leaves}
    shots = {str(leaf["shots"]) for leaf in leaves}
    asked = f"the first {leaves[0]['limit']:,}" if leaves[0]["limit"] else f"{record['questions']:,}"
    examples = repr([(leaf["shots"], leaf["seed"] if leaf["shots"] else None) for leaf in leaves])
    return {
        "task": (task, f"version {record['version']}, {task[:8]}"),
        "template": (of("template"), " and ".join(sorted(templates))),
        "examples": (examples, " and ".join(sorted(shots)) + (f", seed {leaves[0]['seed']}" if shots != {"0"} else "")),
        "questions": (documents, f"{asked} questions, {documents[:8]}"),
    }


def _parts(metric: str, kind: Any, leaves: Sequence[Row]) -> list[tuple[float, list[float]]]:
    outcomes = [leaf.get("outcomes", {}).get(metric) for leaf in leaves]
    if any(not one for one in outcomes):
        return []
    kinds = [leaf["metrics"][metric]["kind"] for leaf in leaves]
    total = sum(map(len, outcomes))
    weights = [1 / len(outcomes) if kind == "unweighted" else len(one) / total for one in outcomes]
    return [(w, influences(k, one)) for w, k, one in zip(weights, kinds, outcomes, strict=True)]


def add_series(series: Series, results: Mapping[str, Result], step: int) -> None:
    """Add the results of a run to its series, at its last step, in place of those in metrics.csv, which say less."""
    for column in [name for name in series if name.startswith(PREFIX)]:
        del series[column]
    for column, result in results.items():
        series[column] = [(step, result.value)]
        if result.error is not None:
            series[f"{column}_se"] = [(step, result.error)]


def benchmark_columns(runs: Iterable[Mapping[str, Result]]) -> tuple[list[Column], list[Column]]:
    """The columns of results that are in tables, and those that have to be asked for."""
    shown, others = dict[str, Column](), dict[str, Column]()
    for results in runs:
        for name, result in results.items():
            best: Any = result.best
            column = Column(name, name, result.unit, NEEDS, best)
            (shown if result.shown else others).setdefault(name, column)
    return list(shown.values()), [column for name, column in others.items() if name not in shown]
