"""Scores saved on disk while a file is labelled, so that nothing is scored twice after an interruption."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from leyden.errors import UserError

Scores = dict[str, list[float]]
"""Key of a prompt with its responses -> the score of each response"""


class LabelScores:
    """A file of scores. Its first line names the input and the reward; each other line has the scores of one prompt.

    Args:
        file: created when the first scores are added.
        about: the input and the reward; scores of other work are never mixed with these.
        anew: whether a file of other work is replaced.

    Raises:
        UserError: there is a file of other work, or one that cannot be read or written.
    """

    def __init__(self, file: Path, about: Mapping[str, str], anew: bool = False) -> None:
        self.file, self.about, self.scores = file, dict(about), Scores()
        with _disk_errors(file):
            if not file.is_file():
                return
            head, self.scores, whole = _parse(file.read_bytes())
            if head == self.about:
                os.truncate(file, whole)
            elif head is None or anew:
                self.scores = {}
                file.unlink()
            else:
                was = ", ".join(f"{name} {value}" for name, value in head.items() if value != self.about.get(name))
                raise UserError(
                    f"{file}: scores of other work that was not finished ({was}); finish that, remove the file, name "
                    "another output, or add --overwrite"
                )

    def add(self, scores: Scores) -> None:
        """Add scores. They are on disk when this returns."""
        with _disk_errors(self.file):
            lines = [] if self.file.is_file() else [json.dumps(self.about)]
            lines += [json.dumps({"key": key, "scores": values}) for key, values in scores.items()]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as file:
                file.write("".join(line + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        self.scores |= scores

    def remove(self) -> None:
        """Delete the file, when the output is written."""
        self.file.unlink(missing_ok=True)


def _parse(data: bytes) -> tuple[dict[str, str] | None, Scores, int]:
    """The first line of a file, its scores, and the number of bytes that hold both, without a line that was cut off."""
    lines = data.split(b"\n")[:-1]
    head, scores, whole = None, Scores(), 0
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            if number == 0:
                head = {str(name): str(value) for name, value in entry.items()}
            else:
                scores[str(entry["key"])] = [_finite(score) for score in entry["scores"]]
        except (ValueError, TypeError, KeyError, AttributeError):
            break
        whole += len(line) + 1
    return head, scores, whole


def _finite(value: object) -> float:
    if not isinstance(value, float | int) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


@contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    """Turns errors of the disk into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be kept ({error.strerror or error}); name another output") from None
