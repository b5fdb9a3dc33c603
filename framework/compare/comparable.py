"""Comparability of runs: those that can be compared by a column, and the reasons why others cannot."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leyden.compare.benchmarks import NEEDS
from leyden.compare.run import RunFiles
from leyden.evaluation.metrics import Column, Fact
from leyden.run.folder import flattened

DIFFERENCES: dict[Fact, str] = {
    "prompts": "other prompts",
    "sampling": "another sampling of answers",
    "reward": "another reward",
    "reference": "another reference model",
    "text": "another retained text",
    "tokenizer": "another tokenizer",
    "algorithm": "another algorithm",
    "rows": "other validation rows",
    "task": "another version of the task",
    "template": "another chat template",
    "examples": "another number of examples",
    "questions": "other questions",
}


@dataclass(frozen=True)
class Refusal:
    """Runs that are left out of some columns, and why. `all_runs`: no runs are left to compare."""

    columns: tuple[str, ...]
    runs: tuple[str, ...]
    reason: str
    all_runs: bool = False

    def __str__(self) -> str:
        if self.all_runs:
            return f"{', '.join(self.columns)}: not compared, since {self.reason}"
        return f"{', '.join(self.columns)}: without {', '.join(self.runs)} ({self.reason})"


def identity(run: RunFiles, fact: Fact, column: str = "") -> tuple[str, str]:
    """The identity of a run's `fact`, equal for runs that share it, and its name; both empty where it is not known.
    Those of benchmarks are of a column."""
    if fact in NEEDS:
        result = run.benchmarks.get(column)
        return ("", "") if result is None else result.identity[fact]
    if fact in ("algorithm", "tokenizer"):
        name = run.algorithm if fact == "algorithm" else str(run.info.get("tokenizer") or "")
        return name, name
    if fact == "rows":
        flat = flattened(run.config)
        rows = [flat.get(f"data{end}", "") for end in ("", ".path", ".val_path", ".val_fraction")]
        return repr(rows), rows[2] if rows[2] not in ("", "null") else rows[1]
    known = (run.facts or {}).get(fact)
    if not isinstance(known, dict):
        return "", ""
    if fact == "sampling":  # another seed draws from the same distribution
        words = [f"{key} {value}" for key, value in known.items() if key != "seed"]
        return ", ".join(sorted(words)), ", ".join(words)
    return str(known.get("fingerprint") or ""), _description(known)


def _description(known: dict[str, Any]) -> str:
    """The name or path of a fact, with rows and fingerprint, which tell two of the same name apart."""
    rows = f", {known['rows']} rows" if known.get("rows") else ""
    return f"{known.get('name') or known.get('path') or 'unnamed'}{rows}, {str(known.get('fingerprint', ''))[:8]}"


def split(runs: Sequence[RunFiles], column: Column) -> tuple[list[RunFiles], list[Refusal]]:
    """Split runs by a column: the runs that are compared by it, and the refusals of the others.

    Compared is the largest set of runs that share what the column needs; of two as large, the first. Runs without the
    column belong to neither.
    """
    candidates = [run for run in runs if column.column in run.series]
    sharing: dict[tuple[str, ...], list[RunFiles]] = {}
    needs = [fact for fact in column.needs if not _is_waived(fact, candidates)]
    for run in candidates:
        sharing.setdefault(tuple(identity(run, fact, column.column)[0] for fact in needs), []).append(run)
    if len(sharing) < 2:
        return candidates, []
    compared = max(sharing.values(), key=len)
    if len(compared) == 1:
        facts = [fact for fact in needs if len({identity(run, fact, column.column)[0] for run in candidates}) > 1]
        each = "; ".join(f"{run.name}: {_names(run, facts, column)}" for run in candidates)
        reason = f"no two runs share {' and '.join(_noun(fact) for fact in facts)} ({each})"
        return [], [Refusal((column.name,), tuple(run.name for run in candidates), reason, True)]
    refused = [_refusal(column, others, compared[0], needs) for others in sharing.values() if others is not compared]
    return compared, refused


def _is_waived(fact: Fact, runs: Sequence[RunFiles]) -> bool:
    """Whether a need is waived: runs that do not record their tokenizer are not refused while all others share one."""
    return fact == "tokenizer" and len({identity(run, fact)[0] for run in runs} - {""}) < 2


def _refusal(column: Column, others: Sequence[RunFiles], compared: RunFiles, needs: Sequence[Fact]) -> Refusal:
    name = column.column
    differing = [fact for fact in needs if identity(others[0], fact, name)[0] != identity(compared, fact, name)[0]]
    reasons = [
        f"{DIFFERENCES[fact]}: {_names(others[0], [fact], column)}; the rest: {_names(compared, [fact], column)}"
        for fact in differing
    ]
    return Refusal((column.name,), tuple(run.name for run in others), ", and ".join(reasons))


def _names(run: RunFiles, facts: Sequence[Fact], column: Column) -> str:
    return ", ".join(identity(run, fact, column.column)[1] or "not known" for fact in facts)


def _noun(fact: Fact) -> str:
    return DIFFERENCES[fact].removeprefix("another ").removeprefix("other ")


def merged(refusals: Sequence[Refusal]) -> list[Refusal]:
    """Refusals, with those of the same runs for the same reason merged into one that names all their columns."""
    columns: dict[tuple[tuple[str, ...], str, bool], Counter[str]] = defaultdict(Counter)
    for refusal in refusals:
        columns[refusal.runs, refusal.reason, refusal.all_runs].update(refusal.columns)
    return [Refusal(tuple(names), runs, reason, alone) for (runs, reason, alone), names in columns.items()]
