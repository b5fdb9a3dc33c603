"""What an evaluation leaves in the run's folder: what it compared, and the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leyden.run.folder import write_whole, writing


class Looks:
    """evaluation.json and samples.jsonl in a folder.

    Args:
        folder: of the run; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Start anew, with what the measures depend on: runs that differ in it cannot be compared."""
        self._write("evaluation.json", json.dumps(facts, ensure_ascii=False, indent=2) + "\n")
        self._write("samples.jsonl", "")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the answers of one look."""
        if self.folder is not None:
            file = self.folder / "samples.jsonl"
            with writing(file), file.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def cut(self, step: int) -> None:
        """Forget what came after a step, to go on from a checkpoint that knows no more."""
        file = None if self.folder is None else self.folder / "samples.jsonl"
        if file is not None and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
            self._write(file.name, "".join(line for line in whole if json.loads(line)["step"] <= step))

    def _write(self, name: str, text: str) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with writing(self.folder / name):
                write_whole(self.folder / name, text)
