"""Scores on disk while a file is labelled, so that nothing is scored twice, whatever stops the work."""

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
    """A file with one line that says what it is about, and one line for each prompt that is scored.

    Args:
        file: made when the first scores are added.
        about: what was asked for; scores of something else are never mixed with these.
        anew: whether a file about something else is replaced.

    Raises:
        UserError: there is a file about something else, or one that cannot be read or written.
    """

    def __init__(self, file: Path, about: Mapping[str, str], anew: bool = False) -> None:
        self.file, self.about, self.scores = file, dict(about), Scores()
        with _named(file):
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
        """Keep scores: they are on disk when this returns."""
        with _named(self.file):
            lines = [] if self.file.is_file() else [json.dumps(self.about)]
            lines += [json.dumps({"key": key, "scores": found}) for key, found in scores.items()]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as file:
                file.write("".join(line + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        self.scores |= scores

    def remove(self) -> None:
        """The work is done."""
        self.file.unlink(missing_ok=True)


def _parse(data: bytes) -> tuple[dict[str, str] | None, Scores, int]:
    """What a file is about, its scores, and how many of its bytes hold them: a line that was cut off counts as none."""
    lines = data.split(b"\n")[:-1]
    head, scores, whole = None, Scores(), 0
    for number, line in enumerate(lines):
        try:
            found = json.loads(line)
            if number == 0:
                head = {str(name): str(value) for name, value in found.items()}
            else:
                scores[str(found["key"])] = [_finite(score) for score in found["scores"]]
        except (ValueError, TypeError, KeyError, AttributeError):
            break
        whole += len(line) + 1
    return head, scores, whole


def _finite(value: object) -> float:
    if not isinstance(value, float | int) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors of the disk, with the file that they are about."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be kept ({error.strerror or error}); name another output") from None
