"""Sampled and scored responses as rows of a JSONL file: what a run keeps, and goes on from when it broke off."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from leyden.batch.forest import Tree
from leyden.example import Sample
from leyden.fingerprint import of_text, of_weights
from leyden.on_policy.rollout_loader import Prompt
from leyden.policy.policy import Response
from leyden.run.folder import write_whole, writing

Row = dict[str, Any]
"""`{"prompt", "responses", "scores", "finished", "tokens", "rollout", "draw", "marks", "row"}`: preference data of
the format "scored", and instruction data by its best response. `tokens` are the ids of each response; `scores` are
null where the reward failed."""


def samples_of(prompt: Prompt, row: Row) -> list[Sample]:
    """The responses to one prompt as a reward sees them."""
    example, answers = prompt.example, zip(row["responses"], row["finished"], strict=True)
    return [Sample(example.messages, text, example.row, finished, example.source) for text, finished in answers]


def row_of(prompt: Prompt, responses: Sequence[Response], marks: Row) -> Row:
    """One prompt's responses as a row, without scores yet; `marks` say which rollout they belong to."""
    return {
        "prompt": prompt.example.messages,
        "responses": [r.text for r in responses],
        "scores": None,
        "finished": [r.finished for r in responses],
        "tokens": [r.tokens for r in responses],
        **marks,
        "row": dict(prompt.example.row),
    }


def fits(prompt: Prompt, row: Row) -> bool:
    """Whether a row of a file answers this prompt."""
    return bool(row["prompt"] == prompt.example.messages and row["row"] == dict(prompt.example.row))


def tree_of(prompt: Prompt, row: Row) -> Tree:
    """The same as token ids with scores, best response first as in preference data; of equal ones the earlier."""
    order = sorted(range(len(row["scores"])), key=lambda k: (-row["scores"][k], k))
    return Tree(prompt.tokens, [row["tokens"][k] for k in order], [row["scores"][k] for k in order], row=prompt.row)


def fingerprint(module: nn.Module, *settings: object) -> str:
    """Hex digits that differ where trained weights or settings do: what sampled responses depend on."""
    trained = ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
    return of_text(repr(settings) + of_weights(trained))


class RolloutFile:
    """Rows of one process, appended as they are scored, so that nothing sampled is lost.

    Args:
        file: rollouts.jsonl in the run's folder; other processes have rollouts-1.jsonl and so on. None keeps nothing.
    """

    def __init__(self, file: Path | None) -> None:
        self.file, self._begun, self._again = file, False, False

    def rows(self) -> Iterator[Row]:
        """The rows that are there; a last line that was cut off is none."""
        if self.file is not None and self.file.is_file():
            with self.file.open(encoding="utf-8") as lines:
                for line in lines:
                    if line.endswith("\n"):
                        yield json.loads(line)

    def begin(self, rollout: int, marks: str, resumed: bool) -> dict[int, Row]:
        """Cut the file to the rollouts before this one, and give back what was sampled of this one in the same way.

        Scores are not taken over: the reward may be another one now.

        Args:
            rollout: the number of the rollout that starts.
            marks: what its responses depend on; see `fingerprint`.
            resumed: whether the run goes on from a checkpoint; else older rollouts belong to another run.

        Returns:
            Rows of this rollout by the number of the draw.
        """
        if self._begun or self.file is None:
            return {}
        rows = list(self.rows())
        before = [row for row in rows if resumed and row["rollout"] < rollout]
        found = [row | {"scores": None} for row in rows if row["rollout"] == rollout and row["marks"] == marks]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._write([*before, *found])
        self._begun, self._again = True, bool(found)
        return {row["draw"]: row for row in found}

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows and hand them to the disk."""
        if self.file is None:
            return
        with writing(self.file), self.file.open("a", encoding="utf-8") as out:
            out.write(_lines(rows))
            out.flush()
            os.fsync(out.fileno())

    def end(self) -> None:
        """A rollout is whole: of rows that were there and have been scored now, only the later stays."""
        if self._again:
            self._write(list({(row["rollout"], row["draw"]): row for row in self.rows()}.values()))
            self._again = False

    def _write(self, rows: Sequence[Row]) -> None:
        assert self.file is not None
        with writing(self.file):
            write_whole(self.file, _lines(rows))


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
