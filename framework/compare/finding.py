"""The search for runs: from the words that were typed to the folders of runs."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from leyden.compare.benchmarks import FILE
from leyden.errors import UserError, nearest


def find_runs(typed: Sequence[str]) -> dict[Path, str]:
    """The runs' folders, each once, in the order typed, with short names that tell them apart.

    A glob counts for what it matches, and a folder that holds runs for all runs directly in it.

    Raises:
        UserError: nothing is there, or no run is in it.
    """
    folders: dict[Path, Path] = {}
    for word in typed:
        for folder in _expanded(word):
            folders.setdefault(folder.resolve(), folder)
    return _short_names(list(folders.values()))


def is_run(folder: Path) -> bool:
    """Whether a folder holds files of a run that can be compared."""
    return any((folder / name).is_file() for name in ("metrics.csv", "config.yaml", FILE))


def _expanded(word: str) -> list[Path]:
    path = Path(word).expanduser()
    if path.exists():
        paths = [path]
    elif glob.has_magic(word):
        paths = sorted((Path(name) for name in glob.glob(str(path), recursive=True)), key=_natural)
        if not paths:
            raise UserError(f"{word}: matches nothing{_suggestion(path)}")
    else:
        raise UserError(f"{word}: no such folder{_suggestion(path)}")
    runs = [run for folder in paths for run in _runs_in(folder)]
    if not runs:
        what = f"a file; give the run's folder, {path.parent}" if path.is_file() else "no run in it"
        raise UserError(f"{word}: {what} (a run is a folder with metrics.csv, as leyden fit leaves it)")
    return runs


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    if is_run(folder):
        return [folder]
    return [inner for inner in sorted(folder.iterdir(), key=_natural) if inner.is_dir() and is_run(inner)]


def _suggestion(path: Path) -> str:
    """Folders that may have been meant, phrased to end a sentence."""
    parent = next((p for p in path.parents if p.is_dir() and not glob.has_magic(str(p))), Path("."))
    folders = [inner for inner in sorted(parent.iterdir(), key=_natural) if inner.is_dir()]
    runs = [str(folder) for folder in folders if _runs_in(folder)]
    if hint := nearest(str(path), runs):
        return hint
    if not runs:
        return f"; there is no run in {parent.resolve()} either"
    return f"; there are {', '.join(runs[:5])}{' and more' if len(runs) > 5 else ''}"


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """The key of an order in which ppo-2 comes before ppo-10."""
    parts = re.findall(r"\d+|\D+", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _short_names(folders: list[Path]) -> dict[Path, str]:
    """Each folder's short name: as many of its last parts as tell it from the others."""
    parts = {folder: folder.resolve().parts for folder in folders}
    for size in range(1, max(map(len, parts.values())) + 1):
        names = {folder: "/".join(own[-size:]) for folder, own in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names
