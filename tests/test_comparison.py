"""benchmarks/comparison.py: what it asks of every algorithm is taken, and its table says what the runs did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import comparison

    return comparison


def test_every_algorithm_gets_the_same_budget(comparison: Any, leyden: Any, workplace: Path) -> None:
    """Scored answers a rollout, whatever the numbers of prompts and samples."""
    for name, words in (comparison.SAMPLED | comparison.GIVEN).items():
        asked = ["fit", *map(str, words), "--data.path", "rows.jsonl", "--print_config"]
        asked += ["--model.reward", "Gold"] if name in comparison.SAMPLED else []
        code, out, err = leyden(*asked)
        assert code == 0, err
        config = yaml.safe_load(out)
        if name in comparison.SAMPLED:
            samples = config["model"]["init_args"].get("samples", 1)
            assert samples * config["data"]["init_args"]["batch_size"] == comparison.ANSWERS, name


def test_the_table_is_sorted_by_reward_and_has_an_interval_over_seeds(comparison: Any) -> None:
    def runs(*rewards: float) -> dict[str, Any]:
        return {"rate": "1e-4"} | {name: list(rewards) for name in comparison.FORMS}

    lines = comparison.table({"a": runs(1.0, 1.2, 1.4), "b": runs(2.0, 2.0, 2.0)}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["b", "a"]
    assert lines[3].split("|")[3].strip() == "1.20 ± 0.50"  # 4.303 times 0.2 / √3


def test_a_sweep_goes_on_until_the_best_rate_lies_between_two_others(comparison: Any) -> None:
    assert comparison.untried({}) == ["3e-5", "1.5e-4", "7e-4"]
    assert comparison.untried({"3e-5": 1.0, "1.5e-4": 3.0, "7e-4": 2.0}) == []
    assert comparison.untried({"3e-5": 1.0, "1.5e-4": 2.0, "7e-4": 3.0}) == ["3e-3"]
    assert comparison.untried({"3e-5": 3.0, "1.5e-4": 2.0, "7e-4": 1.0}) == ["6e-6"]
    assert comparison.untried({"3e-5": 1.0, "1.5e-4": 2.0, "7e-4": 3.0, "3e-3": 4.0}) == []  # the end of the sweep


def test_names_in_the_picture_lie_apart_and_near_what_they_name(comparison: Any) -> None:
    assert comparison.spread_out([1.0, 2.0, 4.0], 0.5) == [1.0, 2.0, 4.0]
    assert comparison.spread_out([1.0, 1.0, 1.0, 9.0], 1.0) == [0.0, 1.0, 2.0, 9.0]


def test_a_picture_has_every_algorithm(comparison: Any, tmp_path: Path) -> None:
    results = {name: {"kl": [0.1, 0.2], "reward": [1.0, 1.1]} for name in ("ppo", "dpo")}
    comparison.plot(results, 1.0, tmp_path / "frontier.svg")
    drawn = (tmp_path / "frontier.svg").read_text(encoding="utf-8")
    assert "<!-- ppo -->" in drawn and "<!-- dpo -->" in drawn
