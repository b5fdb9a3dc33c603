"""Which runs can be compared by which column, and why others cannot."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leyden.compare.run import RunFiles
from leyden.compare.settings import flattened
from leyden.evaluation.metrics import Column, Fact

SAID: dict[Fact, str] = {
    "prompts": "other prompts",
    "sampling": "another sampling of answers",
    "reward": "another reward",
    "reference": "another reference model",
    "text": "another retained text",
    "tokenizer": "another tokenizer",
    "algorithm": "another algorithm",
    "rows": "other validation rows",
}


@dataclass(frozen=True)
class Refusal:
    """Runs that are left out of some columns, and why. `all_runs`: nobody is left to compare."""

    columns: tuple[str, ...]
    runs: tuple[str, ...]
    reason: str
    all_runs: bool = False

    def __str__(self) -> str:
        if self.all_runs:
            return f"{', '.join(self.columns)}: not compared, since {self.reason}"
        return f"{', '.join(self.columns)}: without {', '.join(self.runs)} ({self.reason})"


def identity(run: RunFiles, fact: Fact) -> tuple[str, str]:
    """What tells one run's `fact` from another's, and how to call it; empty where it is not known."""
    if fact in ("algorithm", "tokenizer"):
        found = run.algorithm if fact == "algorithm" else str(run.info.get("tokenizer") or "")
        return found, found
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
    return str(known.get("fingerprint") or ""), _called(known)


def _called(known: dict[str, Any]) -> str:
    """A name or path, with as much beside it as tells two of the same name apart."""
    rows = f", {known['rows']} rows" if known.get("rows") else ""
    return f"{known.get('name') or known.get('path') or 'unnamed'}{rows}, {str(known.get('fingerprint', ''))[:8]}"


def split(runs: Sequence[RunFiles], column: Column) -> tuple[list[RunFiles], list[Refusal]]:
    """The runs that are compared by a column: most of those that share what it needs, of two as many the first.

    Runs without the column belong to neither.
    """
    having = [run for run in runs if column.column in run.series]
    kinds: dict[tuple[str, ...], list[RunFiles]] = {}
    needs = [fact for fact in column.needs if not _open(fact, having)]
    for run in having:
        kinds.setdefault(tuple(identity(run, fact)[0] for fact in needs), []).append(run)
    if len(kinds) < 2:
        return having, []
    kept = max(kinds.values(), key=len)
    if len(kept) == 1:
        facts = [fact for fact in needs if len({identity(run, fact)[0] for run in having}) > 1]
        each = "; ".join(f"{run.name}: {_names(run, facts)}" for run in having)
        reason = f"no two runs share {' and '.join(_plain(fact) for fact in facts)} ({each})"
        return [], [Refusal((column.name,), tuple(run.name for run in having), reason, True)]
    refused = [_refusal(column, others, kept[0], needs) for others in kinds.values() if others is not kept]
    return kept, refused


def _open(fact: Fact, runs: Sequence[RunFiles]) -> bool:
    """Whether a fact that older runs do not tell gives no reason to refuse them."""
    return fact == "tokenizer" and len({identity(run, fact)[0] for run in runs} - {""}) < 2


def _refusal(column: Column, others: Sequence[RunFiles], kept: RunFiles, needs: Sequence[Fact]) -> Refusal:
    apart = [fact for fact in needs if identity(others[0], fact)[0] != identity(kept, fact)[0]]
    reasons = [f"{SAID[fact]}: {_names(others[0], [fact])}; the rest: {_names(kept, [fact])}" for fact in apart]
    return Refusal((column.name,), tuple(run.name for run in others), ", and ".join(reasons))


def _names(run: RunFiles, facts: Sequence[Fact]) -> str:
    return ", ".join(identity(run, fact)[1] or "not known" for fact in facts)


def _plain(fact: Fact) -> str:
    return SAID[fact].removeprefix("another ").removeprefix("other ")


def merged(refusals: Sequence[Refusal]) -> list[Refusal]:
    """Refusals for the same reason as one, with all their columns."""
    columns: dict[tuple[tuple[str, ...], str, bool], Counter[str]] = defaultdict(Counter)
    for refusal in refusals:
        columns[refusal.runs, refusal.reason, refusal.all_runs].update(refusal.columns)
    return [Refusal(tuple(names), runs, reason, alone) for (runs, reason, alone), names in columns.items()]
