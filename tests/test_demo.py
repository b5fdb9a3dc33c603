"""`leyden demo` from end to end on a few rows, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leyden.demo import Size, gain, main, run, scores
from leyden.errors import UserError
from leyden.launcher import main as leyden


def test_every_stage_runs_and_leaves_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(leyden, Path("demo"), Size(rows=64, heldout=6, epochs=1)) == 0
    shown = capsys.readouterr().out
    assert "[7] What the tuned model answers" in shown and "standard errors" in shown
    made = {path.name for path in Path("demo").iterdir()}
    assert made == {
        "questions.csv",
        "questions.jsonl",
        "heldout.jsonl",
        "answers-before.jsonl",
        "answers-after.jsonl",
        "sft",
    }
    assert len(scores(Path("demo/answers-before.jsonl"))) == 6
    rows = [json.loads(line) for line in Path("demo/answers-after.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["row"]["answer"] and row["prompt"][-1]["role"] == "user" for row in rows)
    with pytest.raises(UserError, match="there is something in it"):
        main(["demo"])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["file"], "file: not a folder that can be written to .there is a file in its place"),
        (["file/demo"], "file/demo: not a folder that can be written to .there is a file in its place"),
        (["--qick"], "'--qick' is not known; did you mean '--quick'"),
        (["one", "two"], "'two' is not known; see leyden demo --help"),
        (["--quick=5"], "ignored explicit argument '5'"),
    ],
)
def test_mistakes_are_said_in_one_line(
    typed: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UserError, match=said) as raised:
        main(typed)
    assert "\n" not in str(raised.value)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="Permission denied.; type leyden demo ANOTHER_FOLDER"):
        main([str(tmp_path / "new")])


def test_gain_is_paired() -> None:
    """Differences 1, 0, 2: mean 1, sample deviation 1, standard error 1 / sqrt 3."""
    mean, error = gain([0.0, 1.0, 0.0], [1.0, 1.0, 2.0])
    assert mean == 1.0 and error == pytest.approx(3**-0.5)
