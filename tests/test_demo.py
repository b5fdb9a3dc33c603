"""`leyden demo` from end to end on a few rows, and its arithmetic."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from leyden.cli.demo import Size, evaluation_rows, gain, main, run, unfinished
from leyden.cli.launcher import main as leyden
from leyden.errors import UserError

SMALL = Size(rows=64, epochs=1, pairs=24, prompts=16, batch=16, rollouts=1, rounds=1, heldout=6)


def test_every_stage_runs_and_a_broken_off_demo_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/demo-1")

    def broken(words: list[str]) -> int:
        return 130 if "dpo" in words else leyden(words)

    with pytest.raises(UserError, match="stage 10 ended with code 130"):
        run(broken, folder, SMALL)
    assert unfinished([folder], asdict(SMALL)) == folder and unfinished([folder], asdict(Size())) is None
    capsys.readouterr()
    assert run(leyden, folder, SMALL) == 0
    shown = capsys.readouterr().out
    assert shown.count("done before") == 9 and "[13] All runs beside each other" in shown
    assert "rejection sampling" in shown and "Wins: over SFT" in shown
    made = {path.name for path in folder.iterdir()}
    assert made == {
        "stages.json", "questions.csv", "questions.jsonl", "pairs.jsonl", "prompts.jsonl", "heldout.jsonl",
        "text.jsonl", "sft", "reward_model", "dpo", "ppo", "rejection_sampling", "report.html",
    }  # fmt: skip
    for name in ("sft", "dpo", "ppo", "rejection_sampling"):
        found = evaluation_rows(folder / name / "metrics.csv")
        assert found[0]["step"] == "0" and len(found) >= 2, name
    same = {(folder / name / "evaluation.json").read_text("utf-8") for name in ("dpo", "ppo", "rejection_sampling")}
    assert len(same) == 1  # prompts, reward, reference, text: all runs can be compared
    assert unfinished([folder], asdict(SMALL)) is None
    with pytest.raises(UserError, match="another size"):
        run(leyden, folder, Size())


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="there is something in it"):
        main([str(tmp_path)])


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
