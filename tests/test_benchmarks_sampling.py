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
