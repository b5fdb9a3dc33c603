"""The benchmarks' proof that both sides do the same work, on the embedded model, and their figures."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="runs TRL: pip install 'leyden[bench]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # its libraries warn of much
KINDS = {"sft": "instruction", "dpo": "preference", "reward_model": "preference"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


@pytest.mark.parametrize("name", [*KINDS])
def test_both_sides_take_the_same_first_step(name: str, tmp_path: Path, leyden: Any) -> None:
    import contest
    import sides

    from leyden.paths import resolve

    script, kind = importlib.import_module(name), KINDS[name]
    rows, trees = tmp_path / "sampled.jsonl", tmp_path / "trees.json"
    code, _, said = leyden("data", "sample", "--kind", kind, "--rows", "20", "--language", "en", "--output", rows)
    assert code == 0, said
    options = argparse.Namespace(model=resolve("tiny"), data=str(rows), trees=str(trees), device="cpu", dtype="float32")
    vars(options).update(batch_size=3, max_length=256, warmup=1, steps=1)
    trees.write_text(sides.written(sides.make_trees(options, kind)), encoding="utf-8")
    ours, theirs = script.run(options, None), script.run(options, script.CONTESTANTS["trl, defaults"])
    assert ours["first"] == pytest.approx(theirs["first"], rel=1e-4)
    assert ours["tokens"] == theirs["tokens"] and len(ours["seconds"]) == len(theirs["seconds"]) == 2
    assert contest.speed(ours, 1) == ours["tokens"][1] / ours["seconds"][1]
    assert [*script.CONTESTANTS][:2] == [contest.OURS, "trl, defaults"]


def test_a_contest_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both sides in this process, whose libraries are loaded already."""
    import contest
    import sft

    def work(name: str, options: argparse.Namespace, script: str, **changes: Any) -> Any:
        given = argparse.Namespace(**vars(options) | changes)
        if name == contest.PEAK:
            return contest.product_speed(given, 64) | {"peak_gb": 1.0}
        own = None if name == contest.OURS else sft.CONTESTANTS[name]
        return sft.run(given, own) | {"peak_gb": contest.peak_memory(given)}

    monkeypatch.setattr(contest, "work", work)
    sizes = ["--batch-size", "2", "--steps", "1", "--rounds", "2", "--max-length", "128", "--dtype", "float32"]
    words = ["sft.py", *sizes, "--peers", "trl, best, bf16 weights", "--output", str(tmp_path / "sft.json")]
    monkeypatch.setattr("sys.argv", words)
    contest.main("sft.py", None, sft.CONTESTANTS, sft.run, "instruction", 1024)
    record = json.loads((tmp_path / "sft.json").read_text(encoding="utf-8"))
    assert record["packages"].keys() == set(contest.PACKAGES) and record["options"]["steps"] == 1
    ours, theirs = (record["figures"][name] for name in (contest.OURS, "trl, best, bf16 weights"))
    speeds = zip(ours["tokens_per_second"]["rounds"], theirs["tokens_per_second"]["rounds"], strict=True)
    assert theirs["times_as_fast"]["rounds"] == pytest.approx([a / b for a, b in speeds], rel=1e-3)
    assert len(record["figures"]) == 2 and theirs["peak_gb"]["median"] > 0


def test_figures() -> None:
    import contest
    import sides

    from leyden.batch.forest import Tree

    assert contest.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.00 [2.00, 4.00]"
    assert contest.speed({"tokens": [100, 30, 50], "seconds": [50.0, 1.0, 3.0]}, 1) == 20
    assert sides.tokens_of(Tree([1, 2, 3], [[4], [5, 6]])) == 9


def test_a_few_batches_stand_for_an_epoch_of_grouped_ones() -> None:
    import sides

    options = argparse.Namespace(warmup=1, steps=4)
    lengths = list(range(101))  # fifty batches of two
    order = [*range(100, 50, -1), *range(50, -1, -1)]
    chosen = sides.middle(order, 2, options, lengths)
    middles = [sum(chosen[i : i + 2]) / 2 for i in range(0, 10, 2)]
    assert middles[0] == pytest.approx(50, abs=2) and sorted(middles) == pytest.approx([10, 30, 50, 70, 90], abs=2)
