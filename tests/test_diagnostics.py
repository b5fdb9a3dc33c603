"""Diagnostics: every rule on histories made for it, healthy ones above all; once a run, on resume too; in real runs."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small import TreeData, fit, small, some_trees
from test_on_policy import Questions, algorithm

from leyden.algos import DPO, GRPO, PPO
from leyden.checkpoint.callback import RNGState
from leyden.data import Prompt
from leyden.diagnostics.callback import Diagnostics, settings
from leyden.diagnostics.history import FIRST, LATEST, History
from leyden.diagnostics.rules import RULES, Finding
from leyden.example import Example
from leyden.on_policy import AnsweredPrompt, Rollout
from leyden.on_policy.metrics import rollout_metrics, rollout_sums
from leyden.policy import Native, Response
from leyden.policy.policy import Sampling
from leyden.run.callbacks import FinalValidation
from leyden.run.metrics_csv import MetricsCSV
from leyden.run.progress import Progress, print_line

ROOT = Path(__file__).parent.parent
PPO_SETTINGS = {
    "lr": 1e-4,
    "kl_coef": 0.05,
    "kl_target": None,
    "entropy_coef": 0.0,
    "stop_kl": None,
    "value_weight": 0.1,
    "value_clip": 0.2,
    "samples": 2,
    "max_new_tokens": 64,
}
GRPO_SETTINGS = {k: v for k, v in PPO_SETTINGS.items() if not k.startswith("value")} | {"samples": 8}
DPO_SETTINGS = {"lr": 1e-5, "sft_weight": 0.0, "beta": 0.1}
HEALTHY = {
    "rollout/reward": [1.20, 1.33, 1.34, 1.38, 1.38, 1.55, 1.53, 1.45, 1.58, 1.56, 1.57, 1.56],
    "rollout/length": [20.1, 16.4, 14.1, 12.5, 13.3, 14.2, 13.2, 13.1, 13.6, 13.8, 13.9, 12.4],
    "rollout/eos_rate": [0.996, *[1.0] * 11],
    "rollout/kl": [0, 0.18, 0.44, 0.78, 1.02, 0.83, 1.15, 1.24, 1.19, 1.07, 1.05, 1.30],
    "rollout/entropy": [0.265, 0.293, 0.353, 0.385, 0.388, 0.312, 0.332, 0.352, 0.343, 0.338, 0.297, 0.354],
    "rollout/same": [0.27, 0.33, 0.34, 0.37, 0.45, 0.43, 0.59, 0.61, 0.57, 0.58, 0.57, 0.70],
    "ppo/explained_variance": [0, -0.01, 0.009, 0.01, 0.034, 0.055, 0.144, 0.344, 0.367, 0.376, 0.195, 0.254],
}
"""Twelve rollouts of PPO on the embedded model with the exact reward (benchmarks/rewards.py, seed 0)."""


def rollouts(changed: Mapping[str, Any], given: Mapping[str, Any] = PPO_SETTINGS, clip: float = 0.05) -> History:
    """A history of rollouts of 16 steps, healthy but for what is changed: lists, or functions of the rollout."""
    history = History(given)
    series = HEALTHY | {k: [v(i) for i in range(12)] if callable(v) else v for k, v in changed.items()}
    for rollout in range(min(map(len, series.values()))):
        step = 1 + 16 * rollout
        history.add(step, {name: values[rollout] for name, values in series.items()})
        for minor in range(16):
            found = {"train/grad_norm": 3.0, "policy/clip_fraction": 0.0 if minor == 0 else clip}
            history.add(step + minor, found)
    history.end()
    return history


def fired(history: History) -> dict[str, Finding]:
    return {rule.__name__: found for rule in RULES if (found := rule(history)) is not None}


def steps(name: str, values: list[float], given: Mapping[str, Any] = DPO_SETTINGS, ended: bool = False) -> History:
    history = History(given)
    for step, value in enumerate(values, 1):
        history.add(step, {name: value})
    if ended:
        history.end()
    return history


def evaluated(held: list[float], trained: list[float]) -> History:
    """An evaluation after every second rollout."""
    history = History(PPO_SETTINGS)
    for i, (there, here) in enumerate(zip(held, trained, strict=True)):
        for half in (0, 1):
            history.add(10 * i + half, {"rollout/reward": here, "rollout/length": 9.0})
        history.add(10 * i + 1, {"eval/reward": there})
    return history


WRECKED: list[tuple[str, Callable[[], History], str, str]] = [
    (
        "entropy_collapse",
        lambda: rollouts({"rollout/entropy": lambda i: 1.9 * 0.5**i}),
        "from 1.9 to",
        "entropy_coef 0.01",
    ),
    ("entropy_rise", lambda: rollouts({"rollout/entropy": lambda i: 0.3 + i}), "from 0.3 to", "optimizer.lr 3.33e-05"),
    ("kl_jump", lambda: rollouts({"rollout/kl": lambda i: 60.0 * i}), "nats from the reference", "kl_coef 0.1"),
    ("kl_acceleration", lambda: rollouts({"rollout/kl": lambda i: 0.05 * 1.6**i}), "over the last nine", "kl_coef 0.1"),
    (
        "length_gaming",
        lambda: rollouts({"rollout/length": lambda i: 20.0 + 3 * i, "rollout/length_correlation": lambda i: 0.7}),
        "correlation 0.70",
        "model.reward",
    ),
    ("clipping", lambda: rollouts({}, clip=0.6), "56% of the tokens", "optimizer.lr 3.33e-05"),
    (
        "value_function",
        lambda: rollouts({"ppo/explained_variance": lambda i: -3.0}),
        "values explain -3",
        "value_clip null",
    ),
    ("truncation", lambda: rollouts({"rollout/eos_rate": lambda i: 0.2}), "80% of the answers", "max_new_tokens 128"),
    (
        "scores_tie",
        lambda: rollouts({"rollout/spread": lambda i: 0.0}),
        "all answers of this rollout score the same",
        "model.reward",
    ),
    (
        "nothing_to_compare",
        lambda: rollouts({"rollout/same": lambda i: 0.9}, GRPO_SETTINGS),
        "90% of the prompts",
        "samples 16",
    ),
    (
        "engine_mismatch",
        lambda: rollouts({"rollout/mismatch": lambda i: 2.0, "rollout/mismatch_k3": lambda i: 9.0}),
        "are 2 nats a token from those of training (k3 9)",
        "a --model.engine with",
    ),
    (
        "chosen_collapse",
        lambda: steps("train/chosen_drift", [0.0] * 9 + [-0.9] * 20),
        "0.90 nats a token",
        "sft_weight 0.1",
    ),
    (
        "accuracy_stands",
        lambda: steps("val/accuracy", [0.58, 0.58], ended=True),
        "0.58 at first",
        "optimizer.lr 0.0001",
    ),
    ("no_gradient", lambda: steps("train/grad_norm", [2.0, 0, 0, 0, 0]), "gradient of 4 steps", "data.path"),
    (
        "overoptimisation",
        lambda: evaluated([1.2, 1.5, 1.4, 1.3, 1.25, 1.1, 1.0], [1.9, 2.0, 2.2, 2.4, 2.5, 2.6, 2.9]),
        "from 1.5 to 1 over six evaluations",
        "kl_coef 0.1",
    ),
    ("gradient", lambda: steps("train/grad_norm", [2.0] * 8 + [90.0] * 8), "from 2 to 90", "optimizer.lr 3.33e-06"),
]


@pytest.mark.parametrize(("name", "make", "number", "typed"), WRECKED, ids=[case[0] for case in WRECKED])
def test_a_rule_fires_alone_and_names_number_and_key(
    name: str, make: Callable[[], History], number: str, typed: str
) -> None:
    found = fired(make())
    assert set(found) == {name}
    finding = found[name]
    assert finding.name == name and number in finding.sentence and f"--{finding.key}" in finding.sentence
    assert typed in finding.sentence and "\n" not in finding.sentence


def test_every_rule_has_a_case_and_stands_in_the_document() -> None:
    assert [case[0] for case in WRECKED] == [rule.__name__ for rule in RULES]
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert re.findall(r"^## .*`(\w+)`$", text, re.MULTILINE) == [rule.__name__ for rule in RULES]


@pytest.mark.parametrize("given", [PPO_SETTINGS, GRPO_SETTINGS])
def test_a_healthy_run_is_not_complained_of(given: Mapping[str, Any]) -> None:
    for rollout in range(1, 13):
        assert fired(rollouts({name: values[:rollout] for name, values in HEALTHY.items()}, given)) == {}


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_complained_of(seed: int) -> None:
    """Healthy runs with a tenth of noise on everything, and evaluations and gradients that go nowhere."""
    r = random.Random(seed)
    history = History(PPO_SETTINGS)
    for rollout in range(60):
        at = min(rollout, 11)
        found = {name: values[at] * r.gauss(1, 0.1) for name, values in HEALTHY.items()}
        found |= {
            "rollout/length_correlation": r.gauss(0, 0.2),
            "eval/reward": HEALTHY["rollout/reward"][at] * r.gauss(1, 0.03),
        }
        for minor in range(16):
            noise = {"train/grad_norm": r.lognormvariate(1, 0.7), "train/chosen_drift": r.gauss(0, 0.2)}
            history.add(
                16 * rollout + minor, (found if minor == 0 else {}) | noise | {"policy/clip_fraction": r.random() / 5}
            )
        assert fired(history) == {}, rollout


def test_a_reward_of_nothing_but_length_shows_before_answers_have_grown_by_half() -> None:
    """Lengths and correlations of PPO on the embedded model, rewarded for the number of letters."""
    length = [20.1, 22.1, 20.8, 21.1, 23.4, 24.5, 25.2, 25.9, 26.6, 27.4, 27.1, 27.5]
    together = [0.95, 0.94, 0.92, 0.93, 0.93, 0.91, 0.91, 0.90, 0.89, 0.87, 0.91, 0.89]
    changed = {"rollout/length": length, "rollout/length_correlation": together}
    assert fired(rollouts({name: values[:6] for name, values in changed.items()})) == {}
    assert set(fired(rollouts(changed))) == {"length_gaming"}
    shorter = {"rollout/length": length, "rollout/length_correlation": [x - 0.4 for x in together]}
    assert fired(rollouts(shorter)) == {}, "half of it is not so sure"


def test_the_first_rollout_is_no_reason() -> None:
    """A base model may never end its answers before it is trained."""
    bad = {"rollout/eos_rate": 0.0, "rollout/kl": 99.0, "rollout/same": 1.0, "ppo/explained_variance": -9.0}
    history = rollouts({name: [value, *HEALTHY[name][1:]] for name, value in bad.items()}, GRPO_SETTINGS)
    assert fired(history) == {}


def test_advice_is_of_the_algorithm_and_goes_on_from_its_settings() -> None:
    collapse = {"rollout/entropy": lambda i: 1.9 * 0.5**i}
    bonus = rollouts(collapse, PPO_SETTINGS | {"entropy_coef": 0.02})
    assert "--model.entropy_coef 0.06" in fired(bonus)["entropy_collapse"].sentence
    imitation = fired(rollouts(collapse, {"lr": 1e-4, "samples": 8}))["entropy_collapse"]
    assert imitation.key == "model.optimizer.lr" and "entropy_coef" not in imitation.sentence
    steered = rollouts({"rollout/kl": lambda i: 60.0 * i}, PPO_SETTINGS | {"kl_target": 6.0})
    assert "--model.kl_target 3" in fired(steered)["kl_jump"].sentence
    assert fired(rollouts({"rollout/same": lambda i: 0.99}, PPO_SETTINGS)) == {}  # values compare
    free = rollouts({"ppo/explained_variance": lambda i: -3.0}, PPO_SETTINGS | {"value_clip": None})
    assert "--model.value_weight 1," in fired(free)["value_function"].sentence + ","
    for surrogate, said in (("Clip", {"clipping"}), ("CISPO", {"clipping"}), ("SequenceRatio", set())):
        assert set(fired(rollouts({}, GRPO_SETTINGS | {"surrogate": surrogate}, clip=0.6))) == said


def test_an_engine_that_rounds_is_not_complained_of_and_one_that_is_another_model_is() -> None:
    """bf16 under fp32 as measured, and a few tokens that are far off where the mean is small."""

    def said(mean: float, k3: float, given: Mapping[str, Any] = GRPO_SETTINGS) -> dict[str, Finding]:
        return fired(rollouts({"rollout/mismatch": [mean] * 12, "rollout/mismatch_k3": [k3] * 12}, given))

    assert said(4e-3, 7e-5) == said(0.049, 0.009) == {}
    assert set(said(0.051, 0.002)) == set(said(0.01, 0.011)) == {"engine_mismatch"}
    for correction, advised in (("TIS", "MIS"), ("NoCorrection", "TIS")):
        sentence = said(1.0, 1.0, GRPO_SETTINGS | {"correction": correction})["engine_mismatch"].sentence
        assert sentence.endswith(f" or --model.correction {advised}")
    for given in (GRPO_SETTINGS | {"correction": "IcePop"}, GRPO_SETTINGS):  # an exact engine has none
        assert "--model.correction" not in said(1.0, 1.0, given)["engine_mismatch"].sentence
    once = rollouts({"rollout/mismatch": [0.0] * 11 + [0.09], "rollout/mismatch_k3": [0.0] * 12})
    assert fired(once) == {}, "one rollout is no reason"


def test_the_correction_is_a_setting_where_the_engine_is_not_exact() -> None:
    class Other(Native):
        def is_exact(self, policy: Any) -> bool:
            return False

    trainer: Any = SimpleNamespace(optimizers=[])
    assert settings(trainer, algorithm(GRPO, {}, engine=Other()))["correction"] == "TIS"
    assert "correction" not in settings(trainer, algorithm(GRPO, {}))


def test_scores_that_tie_are_said_at_once_and_nothing_less() -> None:
    def said(values: Mapping[str, float], given: Mapping[str, Any]) -> set[str]:
        history = History(given)
        history.add(1, {"rollout/reward": 0.0} | values)
        return set(fired(history))

    assert said({"rollout/spread": 0.0}, PPO_SETTINGS) == {"scores_tie"}
    assert said({"rollout/spread": 1e-9, "rollout/same": 1.0}, PPO_SETTINGS) == set()  # values compare
    assert said({"rollout/spread": 1e-9, "rollout/same": 1.0}, GRPO_SETTINGS) == {"scores_tie"}
    assert said({"rollout/spread": 1e-9, "rollout/same": 0.99}, GRPO_SETTINGS) == set()


def test_what_a_short_run_has_not_learnt_is_said_at_its_end() -> None:
    for values, said in (
        ([0.58, 0.59], True),
        ([0.58, 0.60], False),
        ([0.69, 0.69], True),
        ([0.7, 0.7], False),
        ([0.5], False),
        ([0.5, 0.5, 0.45, 0.519], True),
    ):
        names = set(fired(steps("val/accuracy", values, ended=True)))
        assert names == ({"accuracy_stands"} if said else set()), values
        assert fired(steps("val/accuracy", values)) == {}, "training goes on"
    for norms, said in (([0.0] * 3, True), ([0.0, 0.1, 0.0], False), ([0.1, 0.0, 0.0, 0.0], False), ([0.0], True)):
        assert set(fired(steps("train/grad_norm", norms, ended=True))) == ({"no_gradient"} if said else set()), norms
    assert fired(steps("train/grad_norm", [0.0] * 3)) == {}
    for same, said in (([0.9], True), ([0.79], False), ([0.7, 0.95], True)):
        names = set(fired(steps("rollout/same", same, GRPO_SETTINGS, ended=True)))
        assert names == ({"nothing_to_compare"} if said else set()), same


def test_values_that_are_no_numbers_are_passed_over() -> None:
    assert fired(rollouts({name: lambda i: float("nan") for name in HEALTHY})) == {}


def test_a_history_stays_small_and_comes_back_from_its_state() -> None:
    history = steps("train/grad_norm", [float(i) for i in range(1000)])
    history.add(1000, {"train/grad_norm": 5.0})  # the same step again
    state = json.loads(json.dumps(history.state_dict()))
    assert len(state["points"]["train/grad_norm"]) == LATEST and len(state["first"]["train/grad_norm"]) == FIRST
    other = History()
    other.load_state_dict(state)
    assert other.latest("train/grad_norm", 2) == [998.0, 5.0] and other.first("train/grad_norm", 8) == [*range(8)]


def length_correlation(prompts: list[tuple[list[int], list[float]]]) -> float | None:
    """Of prompts, each with the lengths of its responses and their scores."""
    prompt = Prompt(0, Example([]), [1])
    answered = [
        AnsweredPrompt(prompt, n, [Response([1] * length, [0.0] * length, True, "") for length in lengths], scores)
        for n, (lengths, scores) in enumerate(prompts)
    ]
    rollout = Rollout(0, answered, Rollout.pack(answered))
    return rollout_metrics(rollout_sums(rollout)).get("rollout/length_correlation")


def test_length_correlation() -> None:
    """By hand; within prompts where there are several answers, or a long answer to a hard question would count."""
    assert length_correlation([([1, 2], [0.0, 1.0]), ([9, 10], [-5.0, -4.0])]) == pytest.approx(1.0)
    assert length_correlation([([1], [3.0]), ([2], [2.0]), ([3], [1.0])]) == pytest.approx(-1.0)
    assert length_correlation([([1, 2], [1.0, 1.0])]) is None
    tiny = [([1, 2], [0.0, 1e-6]), ([9, 10], [-5e-6, -4e-6])]  # a reward on a small scale is a reward
    assert length_correlation(tiny) == pytest.approx(1.0)
    assert length_correlation([([n], [15.3]) for n in range(1, 40)]) is None  # rounding is no spread


# -- in runs ---------------------------------------------------------------------------------------------------------


class Shown(Progress):
    """A progress bar that keeps its lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.lines.append(" ".join(map(str, args)))


def written(folder: Path) -> list[dict[str, Any]]:
    file = folder / "diagnostics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def run(folder: Path, found: Any, data: Any, **options: Any) -> tuple[list[str], list[dict[str, Any]]]:
    folder.mkdir(exist_ok=True)
    bar = Shown()
    callbacks = [bar, Diagnostics(), RNGState(), FinalValidation(), *options.pop("callbacks", [])]
    loggers = [MetricsCSV(folder)]
    fit(found, data, default_root_dir=folder, logger=loggers, callbacks=callbacks, enable_progress_bar=True, **options)
    return [line for line in bar.lines if "; try " in line], written(folder)


def test_what_goes_wrong_is_printed_and_written_once(tmp_path: Path) -> None:
    """No answer of three tokens ever ends."""
    found = algorithm(PPO, {"samples": 2, "sampling": Sampling(max_new_tokens=3), "kl_coef": 0.3})
    lines, rows = run(tmp_path, found, Questions(), max_epochs=6)
    rows = [row for row in rows if row["name"] == "truncation"]
    lines = [line for line in lines if "are cut at 3 tokens" in line]
    assert len(rows) == len(lines) == 1 and lines[0] == f"step {rows[0]['step']} · {rows[0]['sentence']}"
    assert rows[0]["key"] == "model.sampling.max_new_tokens" and rows[0]["value"] > 0.3 and rows[0]["step"] == 3


def test_nothing_else_is_said_of_a_gentle_run(tmp_path: Path) -> None:
    """Random weights end an answer at one token in a hundred, so that cannot be helped."""
    found = algorithm(GRPO, {"samples": 4, "sampling": Sampling(max_new_tokens=20)})
    lines, rows = run(tmp_path, found, Questions(), max_epochs=5)
    assert [row["name"] for row in rows] == ["truncation"] and len(lines) == 1


def wild(lr: float) -> Any:
    return DPO(small(), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr), lr_scheduler=None)


def test_a_learning_rate_a_hundred_times_too_high(tmp_path: Path) -> None:
    data = TreeData(some_trees(24, responses=2), some_trees(4, 1, responses=2), batch_size=4)
    gentle = {row["name"] for row in run(tmp_path / "gentle", wild(1e-3), data, max_epochs=4)[1]}
    assert gentle <= {"accuracy_stands"}, "pairs of random tokens teach nothing that holds for others"
    names = {row["name"] for row in run(tmp_path / "wild", wild(1e-1), data, max_epochs=4)[1]}
    assert "chosen_collapse" in names


def test_a_resumed_run_says_what_an_unbroken_one_does(tmp_path: Path) -> None:
    """Broken off before and after something is found, also where the file has lines that the checkpoint does not."""

    def part(name: str, resume: str | None = None) -> list[dict[str, Any]]:
        folder = tmp_path / name
        options = {"samples": 2, "sampling": Sampling(max_new_tokens=3), "epochs": 2, "minibatches": 2}
        found = algorithm(PPO, options, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-2))
        saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=4,
            log_every_n_steps=1,
            default_root_dir=folder,
            logger=[MetricsCSV(folder)],
            callbacks=[Shown(), Diagnostics(), RNGState(), *([] if resume else [saving])],
            enable_checkpointing=resume is None,
            enable_model_summary=False,
        )
        trainer.fit(found, Questions(), ckpt_path=resume)
        return written(folder)

    whole = part("whole")
    assert len(whole) >= 2
    for step in (whole[0]["step"] - 1, whole[0]["step"], whole[-1]["step"] + 1):
        folder = tmp_path / f"part-{step}"
        folder.mkdir()
        (folder / "diagnostics.jsonl").write_text(
            (tmp_path / "whole" / "diagnostics.jsonl").read_text(encoding="utf-8")
        )
        assert part(folder.name, str(tmp_path / "whole" / f"step={step}.ckpt")) == whole


def test_it_listens_and_changes_nothing(tmp_path: Path) -> None:
    """The same weights with and without it; its logger is gone afterwards, and a dry run leaves no file."""
    weights = []
    for callbacks in ([], [Diagnostics()]):
        found = algorithm(PPO, {"samples": 2, "sampling": Sampling(max_new_tokens=3)})
        trainer = fit(found, Questions(), max_epochs=3, callbacks=callbacks, default_root_dir=tmp_path)
        weights.append([p.detach().clone() for p in found.policy.parameters()])
        assert trainer.loggers == []
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    (tmp_path / "diagnostics.jsonl").unlink()
    found = algorithm(PPO, {"samples": 2, "sampling": Sampling(max_new_tokens=3)})
    fit(found, Questions(), fast_dev_run=3, callbacks=[Diagnostics()], default_root_dir=tmp_path)
    assert not (tmp_path / "diagnostics.jsonl").exists()


def test_without_a_bar_it_says_so_on_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    print_line(SimpleNamespace(progress_bar_callback=None), "step 3 · something")  # type: ignore[arg-type]
    assert shown.getvalue() == "step 3 · something\n"


def test_the_settings_of_an_algorithm() -> None:
    trainer: Any = SimpleNamespace(optimizers=[])
    found = settings(trainer, algorithm(PPO, {"samples": 3}))
    assert found["samples"] == 3 and found["kl_coef"] == 0.05 and found["value_clip"] == 0.2
    assert found["surrogate"] == "Clip"
    assert set(settings(trainer, wild(1.0))) == {"sft_weight", "beta", "max_new_tokens"}
