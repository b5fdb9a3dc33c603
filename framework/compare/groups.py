"""Runs that differ in nothing but their seeds belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from leyden.compare.run import RunFiles
from leyden.compare.settings import Settings, brief, differing, essential

NAMED = 2
"""Settings that a group's name may mention."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs with the same settings, under a name that no other group has."""

    name: str
    runs: tuple[RunFiles, ...]
    settings: Settings


def grouped(runs: Sequence[RunFiles], ignored: Iterable[str] = ()) -> list[SeedGroup]:
    """Put runs together by their settings, in the order of their first runs. A run whose settings are not known stays
    alone. `ignored` are keys that shall make no difference."""
    ignored = tuple(ignored)
    together: dict[object, list[RunFiles]] = {}
    for run in runs:
        settings = essential(run.config, ignored)
        together.setdefault(tuple(sorted(settings.items())) or run.folder, []).append(run)
    found = [(tuple(members), essential(members[0].config, ignored)) for members in together.values()]
    names = _names([(members[0], settings) for members, settings in found])
    return [SeedGroup(name, members, settings) for name, (members, settings) in zip(names, found, strict=True)]


def _names(first: Sequence[tuple[RunFiles, Settings]]) -> list[str]:
    """The algorithm's name, with what tells groups of one algorithm apart, or else the first run's folder."""
    names = [_name(run, settings, first) for run, settings in first]
    often = Counter(names)
    return [f"{name} ({run.name})" if often[name] > 1 else name for name, (run, _) in zip(names, first, strict=True)]


def _name(run: RunFiles, settings: Settings, first: Sequence[tuple[RunFiles, Settings]]) -> str:
    if not settings:
        return run.name
    keys = differing([other for them, other in first if them.algorithm == run.algorithm and other])
    words = [f"{key.rpartition('.')[2]}={brief(settings.get(key))}" for key in keys[:NAMED]]
    return " ".join([run.algorithm, *words])


def doubts(groups: Sequence[SeedGroup]) -> list[str]:
    """Why the runs of a group may differ in more than their seeds."""
    found = []
    for group in groups:
        steps = sorted({run.steps for run in group.runs})
        if len(steps) > 1:
            found.append(f"{group.name}: its runs ended at different steps ({', '.join(map(str, steps))})")
        for key, what in {"version": "versions of leyden", "git": "commits", "base": "base models"}.items():
            values = dict.fromkeys(str(run.info[key]) for run in group.runs if run.info.get(key))
            if len(values) > 1:
                found.append(f"{group.name}: its runs come from different {what} ({', '.join(values)})")
    return found
