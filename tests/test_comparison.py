"""benchmarks/comparison.py: what it asks of every algorithm is taken, and its table says what the runs did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prepared import write


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import comparison

    return comparison


@pytest.fixture
def comparison_start(comparison: Any) -> Any:
    import comparison_start

    return comparison_start


@pytest.fixture
def start(comparison: Any, workplace: Path) -> Any:
    names = ("prompts", "pairs", "choose", "judge", "text")
    return comparison.Start({name: workplace / f"{name}.jsonl" for name in names}, ["--model.policy.path", "tiny"])


def asked(comparison: Any, start: Any, leyden: Any, name: str, seed: int) -> dict[str, Any]:
    """What a run is asked to do."""
    code, out, err = leyden(*map(str, comparison.words_of(start, name, "1e-4", seed)), "--print_config")
    assert code == 0, err
    return dict(yaml.safe_load(out))


def test_every_algorithm_gets_the_same_budget(comparison: Any, start: Any, leyden: Any) -> None:
    """Scored answers, whatever the numbers of prompts and samples; half of it to choose a rate, by other questions."""
    for name in comparison.SAMPLED | comparison.GIVEN:
        config = asked(comparison, start, leyden, name, 0)
        epochs, batch = config["trainer"]["max_epochs"], config["data"]["init_args"]["batch_size"]
        if name in comparison.SAMPLED:
            assert epochs * batch * config["model"]["init_args"].get("samples", 1) == start.budget == 1536, name
        else:
            assert epochs == 2 and batch == 32, name
        assert config["eval"]["init_args"]["path"].endswith("judge.jsonl")
    trial = asked(comparison, start, leyden, "rloo", comparison.TRIAL)
    assert trial["trainer"]["max_epochs"] == start.rollouts // 2
    assert trial["eval"]["init_args"]["path"].endswith("choose.jsonl")


def test_a_real_model_is_chosen_by_one_reward_and_judged_by_another(comparison: Any, start: Any, leyden: Any) -> None:
    rewards = {name: ["ModelReward", ".path", name] for name in ("learn", "other")}
    start = replace(start, reward=rewards["learn"], judge=rewards["other"], fragments=("lora",), temperature=0.7)
    found = {}
    for seed in (0, comparison.TRIAL):
        config = asked(comparison, start, leyden, "rloo", seed)
        assert config["model"]["init_args"]["policy"]["init_args"]["adapter"]["class_path"].endswith("LoraConfig")
        assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-4
        samplings = config["model"]["init_args"]["sampling"], config["eval"]["init_args"]["sampling"]
        assert [sampling.get("init_args", sampling)["temperature"] for sampling in samplings] == [0.7, 0.7]
        parts = config["model"]["init_args"]["reward"], config["eval"]["init_args"]["reward"]
        found[seed] = [part["init_args"]["path"] for part in parts]
    assert found == {0: ["learn", "other"], comparison.TRIAL: ["learn", "learn"]}


def opening(prompt: Any) -> str:
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def test_a_folder_is_of_one_start(comparison_start: Any, tmp_path: Path) -> None:
    comparison_start.same_start(tmp_path, {"model": None, "heldout": 3})
    comparison_start.same_start(tmp_path, {"model": None, "heldout": 3})
    with pytest.raises(SystemExit, match="was begun with .*'heldout': '3'.*give another folder"):
        comparison_start.same_start(tmp_path, {"model": None, "heldout": 4})


def test_preferences_are_split_without_a_held_out_prompt_in_two_places(comparison_start: Any, workplace: Path) -> None:
    rows = [{"prompt": f"{i % 90}?", "chosen": "yes", "rejected": "no"} for i in range(100)]
    rows += [{"prompt": "long " * 99, "chosen": "yes", "rejected": "no"}, {"prompt": "5?", "chosen": "yes"}]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": rows[0]["prompt"]}]
    rows[0] |= {"prompt": turns}
    write(workplace / "all.jsonl", rows)
    names = ("learn", "other", "last", "prompts", "choose", "judge")
    files = {name: workplace / f"{name}.jsonl" for name in names}
    comparison_start.split(workplace / "all.jsonl", "tiny", files, 9)
    prompts = {
        name: [opening(json.loads(line)["prompt"]) for line in file.read_text(encoding="utf-8").splitlines()]
        for name, file in files.items()
    }
    assert [len(prompts[name]) for name in ("prompts", "choose", "judge", "last")] == [72, 9, 9, 18]
    assert len(prompts["learn"]) == len(prompts["other"]) == 41 and not {*prompts["learn"]} & {*prompts["other"]}
    held = set(prompts["choose"]) | set(prompts["judge"])
    assert len(held) == 18 and held == set(prompts["last"])
    assert not held & {*prompts["prompts"], *prompts["learn"], *prompts["other"]}


def test_the_table_is_sorted_by_reward_and_has_an_interval_over_seeds(comparison: Any) -> None:
    def runs(*rewards: float) -> dict[str, Any]:
        return {"rate": "1e-4"} | {name: list(rewards) for name in comparison.COLUMNS if name != "learnt_from"}

    lines = comparison.table({"a": runs(1.0, 1.2, 1.4), "b": runs(2.0, 2.0, 2.0)}).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "learnt" not in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["b", "a"]
    assert lines[3].split("|")[3].strip() == "1.20 ± 0.50"  # 4.303 times 0.2 / √3


def test_a_sweep_goes_on_until_the_best_rate_lies_between_two_others(comparison: Any, start: Any) -> None:
    def untried(start: Any, **rewards: float) -> list[str]:
        of_each = zip(rewards.values(), (1, 2, 12, 13), strict=False)  # reward and KL
        return list(comparison.untried(start, dict(zip(start.rates[1:], of_each, strict=False))))

    assert untried(start) == ["3e-5", "1.5e-4", "7e-4"]
    assert untried(start, a=1.0, b=3.0, c=2.0) == []
    assert untried(start, a=1.0, b=2.0, c=3.0) == ["3e-3"]
    assert untried(start, a=3.0, b=2.0, c=1.0) == ["6e-6"]
    assert untried(start, a=1.0, b=2.0, c=3.0, d=4.0) == []  # the end of the sweep
    near = replace(start, most_kl=10)
    assert untried(near, a=1.0, b=2.0, c=3.0) == []  # the third goes too far
    assert untried(near, a=2.0, b=1.0, c=3.0) == ["6e-6"]
    assert comparison.chosen(near, {"7e-4": (3.0, 12.0), "1.5e-4": (2.0, 11.0)}) == "1.5e-4"


def test_names_in_the_picture_lie_apart_and_near_what_they_name(comparison: Any) -> None:
    assert comparison.spread_out([1.0, 2.0, 4.0], 0.5) == [1.0, 2.0, 4.0]
    assert comparison.spread_out([1.0, 1.0, 1.0, 9.0], 1.0) == [0.0, 1.0, 2.0, 9.0]


def test_a_picture_has_every_algorithm(comparison: Any, tmp_path: Path) -> None:
    results = {name: {"kl": [0.1, 0.2], "reward": [1.0, 1.1]} for name in ("ppo", "dpo")}
    comparison.plot(results, 1.0, tmp_path / "frontier.svg")
    drawn = (tmp_path / "frontier.svg").read_text(encoding="utf-8")
    assert "<!-- ppo -->" in drawn and "<!-- dpo -->" in drawn
