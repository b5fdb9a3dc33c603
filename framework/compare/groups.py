"""Groups of runs that differ in nothing but their seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from leyden.compare.run import RunFiles
from leyden.compare.settings import Settings, brief, essential, telling

NAMED = 2
"""Most settings that a group's name mentions."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs with the same settings, under a name that no other group has."""

    name: str
    runs: tuple[RunFiles, ...]
    settings: Settings


def grouped(runs: Sequence[RunFiles], ignored: Iterable[str] = ()) -> list[SeedGroup]:
    """Group runs by their settings, in the order of the groups' first runs. A run whose settings are not known stays
    alone. `ignored` are keys that make no difference."""
    ignored = tuple(ignored)
    by_settings: dict[object, tuple[list[RunFiles], Settings]] = {}
    for run in runs:
        settings = essential(run.config, ignored)
        key = tuple(sorted(settings.items())) or run.folder
        by_settings.setdefault(key, ([], settings))[0].append(run)
    groups = [(tuple(members), settings) for members, settings in by_settings.values()]
    names = _names([(members[0], settings) for members, settings in groups])
    return [SeedGroup(name, members, settings) for name, (members, settings) in zip(names, groups, strict=True)]


def _names(first: Sequence[tuple[RunFiles, Settings]]) -> list[str]:
    """The groups' names: the algorithm, its settings that differ, and the first run's name where those are the same."""
    names = [_name(run, settings, first) for run, settings in first]
    counts = Counter(names)
    return [f"{name} ({run.name})" if counts[name] > 1 else name for name, (run, _) in zip(names, first, strict=True)]


def _name(run: RunFiles, settings: Settings, first: Sequence[tuple[RunFiles, Settings]]) -> str:
    if not settings:
        return run.name
    keys = telling([other for peer, other in first if peer.algorithm == run.algorithm and other])
    words = [f"{key.rpartition('.')[2]}={brief(settings.get(key))}" for key in keys[:NAMED]]
    return " ".join([run.algorithm, *words])


def doubts(groups: Sequence[SeedGroup]) -> list[str]:
    """Sentences on groups whose runs may differ in more than their seeds."""
    sentences = []
    for group in groups:
        steps = sorted({run.steps for run in group.runs})
        if len(steps) > 1:
            sentences.append(f"{group.name}: its runs ended at different steps ({', '.join(map(str, steps))})")
        for key, what in {"version": "versions of leyden", "git": "commits", "base": "base models"}.items():
            values = dict.fromkeys(str(run.info[key]) for run in group.runs if run.info.get(key))
            if len(values) > 1:
                sentences.append(f"{group.name}: its runs come from different {what} ({', '.join(values)})")
    return sentences
