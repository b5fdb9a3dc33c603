"""The benchmarks of sampling and PPO: both sides do the same work. (The peer of PPO needs its own environment.)"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's libraries warn of much


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    from leyden.paths import resolve

    prompts = [[5, 9, 2, 40, 7], [11, 3], [60, 61, 62, 63, 64, 65, 66, 67, 68], [100, 200, 300]]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    return argparse.Namespace(
        model=resolve("tiny"), trees=str(tmp_path / "prompts.json"), device="cpu", dtype="float32"
    )


def test_all_samplers_answer_alike(options: argparse.Namespace) -> None:
    import contest
    import generate

    vars(options).update(n=1, tokens=6, temperature=0.0, stop=0)
    ours = generate.run(options, None)
    assert ours["tokens"] == 4 * 6 and ours["seconds"] > 0
    for name in ("generate, 64 rows", "generate, one batch"):
        assert generate.run(options, generate.CONTESTANTS[name])["answers"] == ours["answers"]
    assert next(iter(generate.CONTESTANTS)) == contest.OURS
    vars(options).update(n=3, temperature=1.0)
    assert generate.run(options, None)["tokens"] == 3 * 4 * 6
    assert generate.run(options, generate.CONTESTANTS["generate, 64 rows"])["tokens"] == 3 * 4 * 6


def test_samplers_write_their_figures(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contest
    import generate

    def work(name: str, options: argparse.Namespace, script: str, **changes: Any) -> Any:
        """In this process, whose libraries are loaded already."""
        settings = None if name == contest.OURS else generate.CONTESTANTS[name]
        return generate.run(argparse.Namespace(**vars(options) | changes), settings) | {"peak_gb": 1.0}

    monkeypatch.setattr(contest, "work", work)
    chosen = {name: generate.CONTESTANTS[name] for name in (contest.OURS, "generate, one batch")}
    monkeypatch.setattr(generate, "CONTESTANTS", chosen)
    sizes = ["--prompts", "2", "--tokens", "4", "--numbers", "1,2", "--rounds", "1", "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["generate.py", *sizes, "--output", str(tmp_path / "generate.json")])
    generate.main()
    found = json.loads((tmp_path / "generate.json").read_text(encoding="utf-8"))["figures"]
    assert [*found] == [f"{name}, n = {n}" for n in (1, 2) for name in chosen]
    assert found["generate, one batch, n = 2"]["times_as_fast"]["median"] > 0


def test_ppo_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every side's seconds made up."""
    import contest
    import ppo

    def work(name: str, options: argparse.Namespace, script: str, python: str) -> Any:
        rollout = {"seconds": 2.0 if name == contest.OURS else 3.0} | {part: 0.5 for part in ppo.PARTS}
        return {"rollouts": [rollout] * 3, "optimizer_steps": 48, "peak_gb": 1.0}

    monkeypatch.setattr(contest, "work", work)
    monkeypatch.setattr(ppo, "peer_versions", lambda python: {"trl": "1.12.0"})
    words = ["ppo.py", "--batch-size", "2", "--max-length", "256", "--output", str(tmp_path / "ppo.json")]
    monkeypatch.setattr("sys.argv", words)
    ppo.main()
    record = json.loads((tmp_path / "ppo.json").read_text(encoding="utf-8"))
    assert record["packages"]["peer's trl"] == "1.12.0" and record["figures"].keys() == ppo.CONTESTANTS.keys()
    assert record["figures"]["trl, best"]["responses_per_second"]["rounds"] == pytest.approx([4 / 6] * 3, rel=1e-4)
    assert record["figures"]["trl, best"]["times_as_fast"]["median"] == 1.5


@pytest.mark.parametrize("name", ["leyden", "leyden, value model"])
def test_our_side_of_ppo(name: str, options: argparse.Namespace) -> None:
    import ppo

    vars(options).update(batch_size=4, minibatches=2, epochs=2, tokens=4, warmup=1, steps=1)
    result: Any = ppo.run(options, name)
    assert result["optimizer_steps"] == 2 * 2 * 2 and len(result["rollouts"]) == 2
    found = ppo.summary(result, options)
    assert found["speed"] == 4 / result["rollouts"][1]["seconds"]
    assert sum(found[part] for part in ppo.PARTS) == pytest.approx(1) and all(found[part] > 0 for part in ppo.PARTS)


def test_the_rule() -> None:
    from rule import rule

    assert rule("") == 0 and rule("a b a b") == 0.5 and rule("a b c") == 1
