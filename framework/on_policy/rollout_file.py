"""rollouts.jsonl: every answer with its score, from where a run that broke off in a rollout goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from torch import nn

from leyden.atomic import write_whole, writing
from leyden.fingerprint import fingerprint_text, fingerprint_weights
from leyden.on_policy.rollout import AnsweredPrompt

Row = dict[str, Any]
"""See `AnsweredPrompt.to_row`."""


def sampling_fingerprint(module: nn.Module, *settings: object) -> str:
    """Hex digits that differ where trained weights or settings do: what sampled responses depend on."""
    trained = ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
    return fingerprint_text(repr(settings) + fingerprint_weights(trained))


class RolloutFile:
    """Rows of one process, appended as they are scored, so that nothing sampled is lost. Responses that arrive before
    their turn to be scored wait in a file beside it, `rollouts.jsonl.part`, which a killed run leaves.

    Args:
        file: rollouts.jsonl in the run's folder; other processes have rollouts-1.jsonl and so on. None keeps nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self._begun = file, False
        self.part = file and file.with_name(f"{file.name}.part")
        self._left: list[Row] = []
        """Rows of rollouts that were not finished when the run broke off."""
        self._lock = Lock()  # a rollout may be sampled by a thread while another one is scored

    def rows(self) -> Iterator[Row]:
        """The rows of the file; an incomplete last line is skipped."""
        return _rows(self.file)

    def begin(self, rollout: int, fingerprint: str, resumed: bool) -> Mapping[int, Row]:
        """Cut the file to the rollouts before this one, the first time, and give back what was sampled of this one in
        the same way.

        Args:
            rollout: the number of the rollout that starts.
            fingerprint: of what its responses depend on; see `sampling_fingerprint`.
            resumed: whether the run goes on from a checkpoint; else older rollouts belong to another run.

        Returns:
            Rows of this rollout by the number of the draw.
        """
        if self.file is None or self.part is None:
            return {}
        if not self._begun:
            rows = [*_rows(self.part), *self.rows()]
            left = {(row["rollout"], row["draw"]): row for row in rows if row["rollout"] >= rollout and "logp" in row}
            self._left = [row | {"scores": None} for row in left.values()]
            before = [row for row in self.rows() if resumed and row["rollout"] < rollout]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._write(self.part, self._left)
            self._write(self.file, before)
            self._begun = True
        known = (row["rollout"] == rollout and row.get("fingerprint") == fingerprint for row in self._left)
        return {row["draw"]: row for row, is_known in zip(self._left, known, strict=True) if is_known}

    def append(self, answered: Sequence[AnsweredPrompt], rollout: int, fingerprint: str, scored: bool = True) -> None:
        """Add rows, and hand them to the disk.

        Args:
            rollout: its number.
            fingerprint: of what its responses depend on.
            scored: whether their turn has come; else they will be added once more, with their scores.
        """
        file = self.file if scored else self.part
        if file is None:
            return
        rows = [one.to_row(rollout, fingerprint) for one in answered]
        with self._lock, writing(file), file.open("a", encoding="utf-8") as out:
            out.write(_lines(rows))
            out.flush()
            os.fsync(out.fileno())

    def end(self, rollout: int, draws: Collection[int]) -> None:
        """Finish these prompts of a rollout: what waited of them is in the file now."""
        with self._lock:
            if self.part is not None and self.part.is_file():
                rows = _rows(self.part)
                later = [row for row in rows if row["rollout"] > rollout or row["draw"] not in draws]
                self._write(self.part, [row for row in later if row["rollout"] >= rollout])

    @staticmethod
    def _write(file: Path, rows: Sequence[Row]) -> None:
        """Have just these rows in a file; without any there is none, unless it is rollouts.jsonl itself."""
        if not rows and file.suffix == ".part":
            return file.unlink(missing_ok=True)
        with writing(file):
            write_whole(file, _lines(rows))


def _rows(file: Path | None) -> Iterator[Row]:
    if file is not None and file.is_file():
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
