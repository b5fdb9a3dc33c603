"""`leyden demo`: the way from a table to a tuned model, on the embedded model, in minutes on a CPU.

Every stage is a command that a user could type, and is printed as such; they only share one process here, because
starting Python and its libraries takes longer than some of the stages.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from leyden.errors import UserError
from leyden.words import Parser

Main = Callable[[list[str]], int]


@dataclass(frozen=True)
class Size:
    """How much of everything the demo makes."""

    rows: int = 4000
    heldout: int = 200
    epochs: int = 2


QUICK = Size(rows=1000, heldout=60)


def main(argv: Sequence[str]) -> int:
    """`leyden demo [FOLDER] [--quick]`: by default in the next free folder `runs/demo-N`."""
    from leyden.launcher import main as leyden

    options = _options(list(argv))
    free = (Path("runs") / f"demo-{n}" for n in count(1))
    folder = Path(options.folder) if options.folder else next(path for path in free if not path.exists())
    return run(leyden, folder, QUICK if options.quick else Size())


def _options(argv: list[str]) -> argparse.Namespace:
    parser = Parser("leyden demo", __doc__)
    parser.add_argument("folder", nargs="?", help="a new folder for everything the demo makes")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rows and epochs: to see it work, not to see it good"
    )
    return parser.read(argv)


def _make(folder: Path) -> None:
    """Make the demo's folder, which must be new or empty, and see that it can be written to."""
    again = "type leyden demo ANOTHER_FOLDER"
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: there is something in it; remove it, or {again}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "there is a file in its place" if file else error.strerror
        raise UserError(f"{folder}: not a folder that can be written to ({reason}); {again}") from None


def run(main: Main, folder: Path, size: Size | None = None) -> int:
    """Run the demo in `folder`, which must be new or empty, through the command line's `main`."""
    size = size or Size()
    _make(folder)
    stages = _Stages(main)
    table, rows, heldout = (str(folder / name) for name in ("questions.csv", "questions.jsonl", "heldout.jsonl"))
    sample = ["data", "sample", "--kind", "instruction", "--language", "both"]
    stages("A spreadsheet of questions and answers, Korean and English, like one you may have",
           *sample, "--rows", size.rows, "--seed", 1, "--output", table)  # fmt: skip
    stages("The same as JSONL", "data", "convert", table, rows)
    stages("Is every row usable?", "data", "check", "--kind", "instruction", rows)
    stages("Other questions, which the model never trains on",
           *sample, "--rows", size.heldout, "--seed", 2, "--split", "heldout", "--output", heldout)  # fmt: skip
    answers = {when: folder / f"answers-{when}.jsonl" for when in ("before", "after")}
    stages("What the embedded model answers before training",
           "predict", "--config", "demo", "--data.path", heldout, "--output", answers["before"])  # fmt: skip
    trained = folder / "sft"
    stages("Supervised fine-tuning",
           "fit", "--config", "demo", "--data.path", rows, "--data.val_path", heldout,
           "--trainer.max_epochs", size.epochs, "--trainer.default_root_dir", trained)  # fmt: skip
    stages("What the tuned model answers",
           "predict", "--config", "demo", "--model.policy.path", trained / "export", "--data.path", heldout,
           "--output", answers["after"])  # fmt: skip
    report(trained / "metrics.csv", answers["before"], answers["after"])
    print(f"\nThe tuned model is an ordinary transformers folder: {trained / 'export'}")
    print(f"The whole demo took {stages.seconds():.0f} s.")
    return 0


class _Stages:
    """Runs commands one by one and says what each does."""

    def __init__(self, main: Main) -> None:
        self.main, self.count, self.start = main, 0, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __call__(self, what: str, *arguments: object) -> None:
        self.count += 1
        words = [str(argument) for argument in arguments]
        print(f"\n[{self.count}] {what}\n    leyden {shlex.join(words)}", flush=True)
        code = self.main(words)
        if code:
            raise UserError(f"stage {self.count} of the demo ended with code {code}; see the message above")


def scores(answers: Path) -> list[float]:
    """The gold reward of each answer in a file written by `leyden predict`."""
    from leyden.example import Sample
    from leyden.rewards import Gold

    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    samples = [Sample(row["prompt"], row["response"], row["row"], row["finished"]) for row in rows]
    found: list[float] = Gold()(samples).tolist()
    return found


def gain(before: list[float], after: list[float]) -> tuple[float, float]:
    """Mean difference of paired scores, and its standard error."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def report(metrics: Path, before: Path, after: Path, examples: int = 6) -> None:
    """Print what training changed: loss and reward on held-out questions, and answers side by side."""
    from rich.console import Console
    from rich.table import Table

    with metrics.open(encoding="utf-8", newline="") as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    old, new = scores(before), scores(after)
    difference, error = gain(old, new)
    table = Table(title="Held-out questions", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("validation loss (nats per token)", f"{losses[0]:.3f}", f"{losses[-1]:.3f}")
    table.add_row("gold reward (0 to 2)", *(f"{statistics.fmean(s):.3f} ± {_error(s):.3f}" for s in (old, new)))
    answers = Table(title="Answers", title_justify="left")
    for column in ("question", "before", "after", "reward"):
        answers.add_column(column, overflow="fold", ratio=None if column == "reward" else 1)
    for was, now, score in list(zip(_rows(before), _rows(after), new, strict=True))[:examples]:
        answers.add_row(was["prompt"][-1]["content"], _short(was["response"]), _short(now["response"]), f"{score:.2f}")
    console = Console()
    console.print("", table, f"gain in reward: {difference:.3f}, {difference / max(error, 1e-9):.1f} standard errors")
    console.print("", answers)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
