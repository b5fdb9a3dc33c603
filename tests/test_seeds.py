"""One seed for a run: `--seed_everything` decides all that training draws, and nothing that is measured on."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from leyden.data.datamodule import DataModule
from leyden.policy.policy import Sampling
from leyden.rng import resolve_seed


class Nothing(DataModule):
    def source(self, row: int) -> str:
        return ""


def test_what_has_no_seed_follows_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert (resolve_seed(None), resolve_seed(0), resolve_seed(3)) == (7, 0, 3)
    assert (Nothing().seed, Nothing(seed=0).seed) == (7, 0)
    assert Sampling().seeded() == Sampling(seed=7) and Sampling(seed=0).seeded() == Sampling(seed=0)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert (resolve_seed(None), Nothing().seed) == (0, 0)


def answers(run: Path) -> list[Any]:
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], row["responses"]) for row in rows]


def test_runs_of_other_seeds_draw_other_things_and_are_measured_on_the_same(leyden: Any, workplace: Path) -> None:
    assert leyden("data", "sample", "--kind", "prompts", "--rows", "24", "--output", "prompts.jsonl")[0] == 0
    fit = ["fit", "--config", "rejection_sampling", "--config", "eval", "--data.path", "prompts.jsonl"]
    fit += ["--data.batch_size", "4", "--data.val_fraction", "0", "--model.samples", "2", "--model.minibatches", "2"]
    fit += ["--model.sampling.max_new_tokens", "4", "--model.reward", "Gold"]
    fit += ["--eval.path", "prompts.jsonl", "--eval.sampling.max_new_tokens", "4", "--eval.size", "4"]
    for name, seed in {"a": 1, "again": 1, "other": 2}.items():
        words = [*fit, "--seed_everything", str(seed), "--trainer.default_root_dir", f"runs/{name}"]
        code, _, err = leyden(*words)
        assert code == 0, err
    runs = {name: workplace / "runs" / name for name in ("a", "again", "other")}
    assert answers(runs["a"]) == answers(runs["again"])
    a, other = answers(runs["a"]), answers(runs["other"])
    assert [prompt for prompt, _ in a] != [prompt for prompt, _ in other], "another order"
    firsts = []
    for run in runs.values():
        with (run / "metrics.csv").open(encoding="utf-8") as file:
            firsts.append(next(csv.DictReader(file)))
    assert len({(row["eval/reward"], row["eval/length"], row["eval/entropy"]) for row in firsts}) == 1

    config = yaml.safe_load((runs["a"] / "config.yaml").read_text(encoding="utf-8"))
    assert config["seed_everything"] == 1 and config["data"]["init_args"]["seed"] is None
    code, _, err = leyden(
        "fit", "--config", "runs/a/config.yaml", "--seed_everything", "2", "--trainer.default_root_dir", "runs/b"
    )
    assert code == 0 and answers(workplace / "runs" / "b") == other, err


def test_the_seed_of_a_run_reaches_the_noise_of_its_answers() -> None:
    """Of the same prompts: the order alone does not make seeds differ."""
    from small import small

    policy = small()
    seen = [policy.generate([[1, 2], [3]], 2, replace(Sampling(max_new_tokens=8), seed=s)) for s in (None, 0, 1)]
    texts = [[[r.tokens for r in group] for group in groups] for groups in seen]
    assert texts[0] == texts[1] != texts[2]
