"""benchmark.json in a run's folder: where it is, and the results of tasks, kept as each of them ends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leyden.atomic import write_whole
from leyden.errors import UserError

FILE = "benchmark.json"
Record = dict[str, Any]
"""What is known of one task or group. See docs/benchmarks.md for its keys."""
ASKED = ("version", "task", "template", "shots", "seed", "limit", "lm_eval", "model", "settings")
"""What must be the same for a task not to be asked again."""


def results_folder(typed: str, output: str | None, several: bool) -> Path:
    """Where the results of a model go: to its run's folder, or for a model that is no run's to `runs/benchmark-NAME`.

    Args:
        typed: the model as it was typed.
        output: a folder to write to instead; of several models each has a folder in it.
    """
    path, run = Path(typed).expanduser(), run_of(typed)
    path = run or path
    name = re.sub(r"[^\w.-]+", "-", path.resolve().name if path.exists() else typed.rpartition("/")[2])
    if output is not None:
        return Path(output).expanduser() / name if several else Path(output).expanduser()
    return run if run is not None else Path("runs") / f"benchmark-{name}"


def run_of(typed: str) -> Path | None:
    """The run's folder that is meant, by itself or by its export; None for other models."""
    path = Path(typed).expanduser()
    folders = [path, path.parent] if path.name == "export" else [path]
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


class Results:
    """The results in a folder.

    Two commands may add to the same file: each adds under a lock to what the file holds by then.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE

    def read(self) -> dict[str, dict[str, Record]]:
        """`tasks` and `groups` by name; both empty where there is no file.

        Raises:
            UserError: the file is damaged.
        """
        if not self.file.is_file():
            return {"tasks": {}, "groups": {}}
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            return {kind: dict(content.get(kind) or {}) for kind in ("tasks", "groups")}
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{self.file}: damaged ({error}); move it away, and type the same again") from None

    def add(self, kind: str, name: str, record: Record) -> None:
        """Add a task's or a group's record in the place of an older one. A group that another task's result was part of
        is gone until it is added again."""
        try:
            with self._locked():
                content = self.read()
                if kind == "tasks":
                    groups = content["groups"].items()
                    content["groups"] = {one: group for one, group in groups if name not in group.get("tasks", ())}
                content[kind][name] = record
                write_whole(self.file, json.dumps(content, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.file}: cannot be written ({error.strerror or error}); make room, or name a folder by --output, "
                "and type the same again: tasks that are in the file are not asked anew"
            ) from error

    def done(self, name: str, asked: Record) -> Record | None:
        """The record of a task that was asked in this very way of this very model, if there is one."""
        known = self.read()["tasks"].get(name)
        if known is None or any(known.get(key) != asked.get(key) for key in ASKED):
            return None
        return known

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        with self.file.with_name(f".{FILE}.lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:  # some file systems have no locks
                pass
            yield
