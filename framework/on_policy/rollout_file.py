"""rollouts.jsonl: every answer with its score, from where a run that broke off in a rollout goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
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
    """Rows of one process, appended as they are scored, so that nothing sampled is lost.

    Args:
        file: rollouts.jsonl in the run's folder; other processes have rollouts-1.jsonl and so on. None keeps nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self._begun, self._again = file, False, False
        self._rollout, self._fingerprint = 0, ""

    def rows(self) -> Iterator[Row]:
        """The rows of the file; an incomplete last line is skipped."""
        if self.file is not None and self.file.is_file():
            with self.file.open(encoding="utf-8") as lines:
                for line in lines:
                    if line.endswith("\n"):
                        yield json.loads(line)

    def begin(self, rollout: int, fingerprint: str, resumed: bool) -> Mapping[int, Row]:
        """Cut the file to the rollouts before this one, and give back what was sampled of this one in the same way.

        Args:
            rollout: the number of the rollout that starts.
            fingerprint: of what its responses depend on; see `sampling_fingerprint`.
            resumed: whether the run goes on from a checkpoint; else older rollouts belong to another run.

        Returns:
            Rows of this rollout by the number of the draw.
        """
        self._rollout, self._fingerprint = rollout, fingerprint
        if self._begun or self.file is None:
            return {}
        rows = list(self.rows())
        before = [row for row in rows if resumed and row["rollout"] < rollout]
        known = [
            row | {"scores": None}
            for row in rows
            if row["rollout"] == rollout and row.get("fingerprint") == fingerprint and "logp" in row
        ]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._write([*before, *known])
        self._begun, self._again = True, bool(known)
        return {row["draw"]: row for row in known}

    def append(self, answered: Sequence[AnsweredPrompt], again: bool = False) -> None:
        """Add rows of the rollout that has begun, and hand them to the disk.

        Args:
            again: whether they will be added once more, with their scores.
        """
        self._again |= again
        if self.file is None:
            return
        rows = [one.to_row(self._rollout, self._fingerprint) for one in answered]
        with writing(self.file), self.file.open("a", encoding="utf-8") as out:
            out.write(_lines(rows))
            out.flush()
            os.fsync(out.fileno())

    def end(self) -> None:
        """Finish a rollout: of a row that was added twice only the later copy stays, and draws stand in order."""
        if self._again and self.file is not None:
            rows = {(row["rollout"], row["draw"]): row for row in self.rows()}
            self._write([rows[key] for key in sorted(rows)])
            self._again = False

    def _write(self, rows: Sequence[Row]) -> None:
        assert self.file is not None
        with writing(self.file):
            write_whole(self.file, _lines(rows))


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
