"""What the benchmarks write of a run, and what they say of a later one, with figures made by hand."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

FAST = [1.9, 2.0, 2.1]  # quartiles 1.95 and 2.05
Say = Callable[..., tuple[Any, str]]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


def figures(ratios: Sequence[float], memory: float = 1.0, speed: float = 100.0, peer: str = "trl, best") -> Any:
    """Of a run in which we were so many times as fast as the peer in each round, with so many times its memory."""
    import contest

    speeds = {contest.OURS: [speed * ratio for ratio in ratios], peer: [speed] * len(ratios)}
    runs = {contest.OURS: [{"peak_gb": memory}] * len(ratios), peer: [{"peak_gb": 1.0}] * len(ratios)}
    return contest.figures(speeds, runs, "tokens_per_second")


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Say:
    """Hold figures against those on file, which are FAST, and say with which code it ends and what it prints."""
    baseline, contest = importlib.import_module("baseline"), importlib.import_module("contest")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trees.json").write_text("[]")
    written = {
        "model": "folder/tiny",
        "trees": "trees.json",
        "data": "",
        "dtype": "float32",
        "batch_size": 8,
        "rounds": 3,
    }

    def held(found: Any, packages: dict[str, str] | None = None, **changes: Any) -> tuple[Any, str]:
        options = argparse.Namespace(**{"output": "", "against": "sft.json"} | written | changes)

        def measure() -> Any:
            assert found is not None, "what cannot be compared is not measured"
            return found

        try:
            contest.hold(options, "sft.py", packages or {"leyden": "1", "trl": "1.16"}, measure)
        except SystemExit as stop:
            code = stop.code
        else:
            code = "not compared"
        return code, capsys.readouterr().out

    assert baseline.processor() and held(figures(FAST), output="sft.json", against="") == ("not compared", "")
    return held


def test_the_file_says_what_was_measured_and_with_what(say: Say) -> None:
    record = json.loads(Path("sft.json").read_text(encoding="utf-8"))
    assert (
        record["options"].items() >= {"benchmark": "sft", "model": "tiny", "dtype": "float32", "batch_size": 8}.items()
    )
    assert record["options"].keys() & {"data", "trees", "output", "against", "rounds"} == set()
    assert record["packages"] == {"leyden": "1", "trl": "1.16"} and " cores" in record["machine"]
    peer = record["figures"]["trl, best"]
    assert peer["tokens_per_second"] == {"rounds": [100] * 3, "median": 100, "quartiles": [100, 100]}
    assert peer["times_as_fast"] == {"rounds": FAST, "median": 2.0, "quartiles": [1.95, 2.05]}
    assert record["figures"]["leyden"]["tokens_per_second"]["rounds"] == [190, 200, 210]


@pytest.mark.parametrize(
    ("ratios", "worse"),
    [
        (FAST, False),
        ([1.72, 1.82, 1.92], False),  # its upper quartile 1.87 is not under 0.95 x 1.95 = 1.8525
        ([1.70, 1.80, 1.90], True),  # 1.85 is
        ([1.6, 1.7, 2.2], False),  # lower at the median, and nothing that its spread does not explain
        ([3.0], False),
    ],
)
def test_a_ratio_is_worse_beyond_the_spread_of_both_runs(ratios: list[float], worse: bool, say: Say) -> None:
    line = "trl, best: leyden times as fast 1.80 [1.75, 1.85], earlier 2.00 [1.95, 2.05]\n"
    assert say(figures(ratios)) == ((1, line) if worse else (0, "nothing is worse than in sft.json\n"))


def test_machines_may_differ_and_memory_counts(say: Say) -> None:
    assert say(figures(FAST, speed=10.0))[0] == 0
    assert say(figures(FAST, memory=1.05))[0] == 0
    line = "trl, best: leyden times the memory 1.10 [1.10, 1.10], earlier 1.00 [1.00, 1.00]\n"
    assert say(figures(FAST, memory=1.1)) == (1, line)


def test_what_cannot_be_compared_is_refused_before_it_is_measured(say: Say) -> None:
    refused = "sft.json cannot be compared with, since options differ: "
    assert say(None, dtype="bfloat16", batch_size=4)[0] == (
        f"{refused}dtype float32 there, bfloat16 here; batch_size 8 there, 4 here"
    )
    Path("others.json").write_text("[[[1], [[2]], null]]")
    assert say(None, trees="others.json")[0].startswith(f"{refused}rows ")
    assert say(None, against="none.json")[0] == "none.json is not there: --output none.json writes it"
    Path("moved.json").write_text("[]")
    more = figures([*FAST, 2.0])
    assert say(more, trees="moved.json", model="elsewhere/tiny", data="named.jsonl", rounds=4)[0] == 0


def test_a_peer_of_the_file_that_did_not_run_is_named(say: Say) -> None:
    line = "trl, best: not in this run, so nothing can be said of it\n"
    assert say(figures(FAST, peer="trl, defaults")) == (1, line)


def test_other_packages_are_a_note(say: Say) -> None:
    code, printed = say(figures(FAST), {"leyden": "2", "trl": "1.17", "torch": "2.13"})
    note = "note: other packages than in sft.json: trl 1.16 there, 1.17 here; torch not there, 2.13 here"
    assert code == 0 and printed.splitlines() == [note, "nothing is worse than in sft.json"]


@pytest.mark.parametrize("name", ["sft", "reward_model", "dpo"])
def test_the_command_writes_the_file_and_holds_the_next_run_against_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With every contestant's seconds made up, so that nothing is run."""
    contest, script = importlib.import_module("contest"), importlib.import_module(name)
    rows = {"sft": {"prompt": "a b", "response": "c d"}}.get(name, {"prompt": "a", "chosen": "b", "rejected": "c d"})
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(rows)}\n" * 4)
    seconds, asked = {contest.OURS: 1.0}, list[str]()

    def work(name: str, options: Any, script: str, **changes: Any) -> Any:
        asked.append(name)
        steps = [9.0, seconds.get(name, 2.0)]
        return {"peak": 1e9, "peak_gb": 1.0, "first": [1.0, 2.0], "work": [1e6] * 2, "tokens": [8, 8], "seconds": steps}

    monkeypatch.setattr(contest, "work", work)
    words = ["--data", str(tmp_path / "rows.jsonl"), "--batch-size", "2", "--steps", "1", "--rounds", "2"]
    words += ["--peers", "trl, best, bf16 weights"]

    def run(*more: str) -> None:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *words, *more])
        kind = "instruction" if name == "sft" else "preference"
        contest.main(f"{name}.py", None, script.CONTESTANTS, script.run, kind, 64)

    file = tmp_path / "cpu.json"
    run("--output", str(file))
    assert asked[:2] == [contest.OURS, "trl, defaults"]  # the proof, which takes the first rows as they stand
    assert asked[2:] == 2 * [contest.PEAK, contest.OURS, "trl, best, bf16 weights"]
    found = json.loads(file.read_text(encoding="utf-8"))["figures"]
    assert found["trl, best, bf16 weights"]["times_as_fast"]["rounds"] == [2.0, 2.0]
    for slower, code in ((1.0, 0), (1.1, 1)):
        seconds[contest.OURS] = slower
        with pytest.raises(SystemExit) as stop:
            run("--against", str(file))
        assert stop.value.code == code
    assert capsys.readouterr().out.endswith("leyden times as fast 1.82 [1.82, 1.82], earlier 2.00 [2.00, 2.00]\n")
    with pytest.raises(SystemExit):
        run("--peers", "nobody")
    assert "no peer's name begins with nobody: trl, defaults; trl, best" in capsys.readouterr().err


def test_the_files_of_the_project_can_be_read() -> None:
    folder = Path(__file__).parent.parent / "benchmarks" / "baselines"
    for file in folder.glob("*.json"):
        assert json.loads(file.read_text(encoding="utf-8")).keys() == {"options", "machine", "packages", "figures"}, (
            file
        )
