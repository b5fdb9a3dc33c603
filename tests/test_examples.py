"""The programs of examples/ run as they stand, one after the other in an empty folder."""

from __future__ import annotations

import ast
import csv
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = ("fine_tune", "own_reward", "own_algorithm", "evaluate", "align_to_preferences")


class Ran:
    """What every program printed, and the folder in which they ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.printed: dict[str, str] = {}

    def column(self, run: str, name: str) -> list[float]:
        """The numbers in a column of a run's metrics.csv."""
        with (self.folder / "runs" / run / "metrics.csv").open(encoding="utf-8") as stream:
            return [float(row[name]) for row in csv.DictReader(stream) if row[name]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    import contextlib
    import io
    import warnings

    ran = Ran(tmp_path_factory.mktemp("examples"))
    with contextlib.chdir(ran.folder), warnings.catch_warnings():
        for name in SCRIPTS:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
            ran.printed[name] = printed.getvalue()
    yield ran


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def test_the_first_learns_and_answers(ran: Ran) -> None:
    assert "→" in ran.printed["fine_tune"] and ran.printed["fine_tune"].rpartition("→")[2].strip()
    loss = ran.column("fine-tuned", "val/loss")
    assert loss[-1] < loss[0] and (ran.folder / "runs/fine-tuned/export/model.safetensors").is_file()


def test_the_reward_rises(ran: Ran) -> None:
    first, last = numbers(ran.printed["own_reward"])
    assert last > first


def test_the_own_algorithm_logs_and_learns(ran: Ran) -> None:
    hard, loss = ran.column("focal", "train/hard"), ran.column("focal", "train/loss")
    assert 0 < hard[-1] < hard[0] <= 1 and loss[-1] < loss[0]


def test_the_evaluation_prints_its_measures(ran: Ran) -> None:
    words = dict(line.split() for line in ran.printed["evaluate"].splitlines() if line.startswith(("val/", "eval/")))
    found = {name: float(value) for name, value in words.items()}
    assert set(found) == {"val/loss", "eval/reward", "eval/win_rate", "eval/kl", "eval/length"}
    assert 0 <= found["eval/reward"] <= 2 and found["eval/win_rate"] > 0.5 and found["eval/kl"] > 0


def test_preferences_are_learnt(ran: Ran) -> None:
    lines = [line for line in ran.printed["align_to_preferences"].splitlines() if "before" in line]
    before, after = numbers(lines[0])
    assert lines[0].startswith("val/accuracy") and after > before == 0.5
    assert (ran.folder / "runs/aligned/evaluation.json").is_file()


def test_a_second_time_the_folder_is_refused(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    from leyden.errors import UserError

    monkeypatch.chdir(ran.folder)
    with pytest.raises(UserError, match="already holds a run"):
        runpy.run_path(str(EXAMPLES / "own_algorithm.py"), run_name="__main__")


def test_the_pages_name_every_example() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    for page in ("README.md", "README.ko.md"):
        text = (EXAMPLES / page).read_text(encoding="utf-8")
        assert set(re.findall(r"^\| \[[^\]]+\]\(([^)]+)\) \|", text, re.MULTILINE)) == files
    assert {f"{name}.py" for name in SCRIPTS} | {"spreadsheet_to_model.ipynb"} == files


def test_examples_are_short_and_say_what_they_are() -> None:
    def lines(tree: ast.Module) -> int:
        return sum(1 for node in ast.walk(tree) if isinstance(node, ast.stmt))

    trees: dict[str, Any] = {n: ast.parse((EXAMPLES / f"{n}.py").read_text(encoding="utf-8")) for n in SCRIPTS}
    assert all(ast.get_docstring(tree) for tree in trees.values())
    assert lines(trees["fine_tune"]) <= 20 and all(lines(tree) <= 40 for tree in trees.values())
