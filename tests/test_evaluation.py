"""Evaluation: the same measures for every algorithm, against numbers by hand, and that looking changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from ranks import Ranks
from small import TreeData, fit, labelled_trees, small, some_trees, teacher, weights_of
from test_on_policy import Questions, evens

from leyden.algos import BCO, DPO, GRPO, KTO, PPO, SFT, Distillation, OnlineDPO, RejectionSampling
from leyden.batch.forest import Tree, pack
from leyden.checkpoint.callback import RNGState
from leyden.data.chat_template import ChatTemplate
from leyden.data.prompts import Prompt
from leyden.evaluation import metrics as answers
from leyden.evaluation.evaluator import Evaluator
from leyden.example import Example, Message
from leyden.models import CausalLM
from leyden.policy.policy import Sampling
from leyden.run.callbacks import FinalValidation
from leyden.run.metrics_csv import MetricsCSV

SHORT = Sampling(max_new_tokens=6)
NAMES = {
    f"eval/{name}"
    for name in "reward reward_se kl kl_se win_rate win_rate_low win_rate_high length eos_rate entropy distinct_2 "
    "retained_loss".split()
}


class Fixed(Evaluator):
    """Evaluation on prompts of numbers, by the share of even ones."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**({"reward": evens, "sampling": SHORT} | kwargs))

    def prompts(self, template: ChatTemplate) -> list[Prompt]:
        asked = [[3, 5, 8], [7], [11, 2], [6, 6, 6, 6], [9, 1]]
        said = [Message(role="user", content=" ".join(map(str, tokens))) for tokens in asked]
        return [Prompt(n, Example([said[n]], source=f"q:{n + 1}"), tokens) for n, tokens in enumerate(asked)]

    def text(self, template: ChatTemplate) -> list[Tree]:
        return [Tree([], [[4, 9, 2, 8]]), Tree([], [[1, 2]])]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def made(kind: type, **more: Any) -> tuple[Any, Any]:
    """An algorithm and its data."""
    given: dict[str, Any] = dict(optimizer=adam, lr_scheduler=None)
    if kind in (SFT, DPO, KTO, BCO):
        responses = 1 if kind is SFT else 2
        trees, held = some_trees(8, 1, responses), some_trees(3, 2, responses)
        trees, held = (labelled_trees(8), labelled_trees(3, 2)) if kind in (KTO, BCO) else (trees, held)
        return kind(small(), **(given | more)), TreeData(trees, held, batch_size=4)
    given |= dict(reward=evens, sampling=SHORT, keep_rollouts=False) | ({} if kind is PPO else {"samples": 3})
    given |= dict(teacher=teacher()) if kind is Distillation else {}
    return kind(small(), **(given | more)), Questions(held=3)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# -- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SFT, DPO, KTO, BCO, PPO, GRPO, RejectionSampling, OnlineDPO, Distillation])
def test_every_algorithm_logs_the_same_measures(kind: type, tmp_path: Path) -> None:
    algorithm, data = made(kind)
    trainer = fit(algorithm, data, callbacks=[Fixed(), FinalValidation()], logger=[MetricsCSV(tmp_path)],
                  default_root_dir=tmp_path)  # fmt: skip
    logged = {name for name in trainer.callback_metrics if name.startswith("eval/")}
    assert logged == NAMES
    rows = read(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [0] * 5 + [trainer.global_step] * 5
    assert all(row["reward"] == row["reference_reward"] and row["response"] == row["reference"] for row in rows[:5])
    assert set(json.loads((tmp_path / "evaluation.json").read_text())) == {
        "prompts", "reward", "reference", "text", "sampling",
    }  # fmt: skip


def test_the_measures_are_those_by_hand(tmp_path: Path) -> None:
    algorithm, data = made(SFT)
    start = small()
    looks = Fixed(sampling=Sampling(max_new_tokens=6, temperature=0.8))
    trainer = fit(algorithm, data, callbacks=[looks, FinalValidation()], default_root_dir=tmp_path)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("eval/")}
    policy, asked = algorithm.policy.eval(), looks.prompts(None)  # type: ignore[arg-type]
    said = policy.generate([p.tokens for p in asked], 1, looks.sampling, [p.row for p in asked])
    batches = [pack([Tree(p.tokens, [group[0].tokens])]) for p, group in zip(asked, said, strict=True)]
    with torch.no_grad():
        ratios = [float((policy(b, {"logp"}, 0.8).logp - start.eval()(b, {"logp"}, 0.8).logp).sum()) for b in batches]
        entropy = sum(float(policy(b, {"logp", "entropy"}, 0.8).entropy.sum()) for b in batches)
        text = [policy(pack([tree])).logp.sum() for tree in looks.text(None)]  # type: ignore[arg-type]
    kl = torch.tensor(ratios, dtype=torch.float64)
    assert found["eval/kl"] == pytest.approx(float(kl.mean()), abs=1e-5) and found["eval/kl"] > 0.01
    assert found["eval/kl_se"] == pytest.approx(float(kl.std() / 5**0.5), abs=1e-5)
    lengths = [len(group[0].tokens) for group in said]
    assert found["eval/length"] == sum(lengths) / 5
    assert found["eval/entropy"] == pytest.approx(entropy / sum(lengths), abs=1e-5)
    assert found["eval/retained_loss"] == pytest.approx(-float(sum(text)) / 4, abs=1e-5)  # roots are not predicted
    assert found["eval/eos_rate"] == sum(group[0].finished for group in said) / 5
    rewards = evens([type("S", (), {"response": group[0].text})() for group in said])  # type: ignore[misc]
    assert found["eval/reward"] == pytest.approx(sum(rewards) / 5)
    before = start.generate([p.tokens for p in asked], 1, looks.sampling, [p.row for p in asked])
    theirs = evens([type("S", (), {"response": group[0].text})() for group in before])  # type: ignore[misc]
    pairwise_wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(rewards, theirs, strict=True)]
    assert found["eval/win_rate"] == pytest.approx(sum(pairwise_wins) / 5)


def test_the_same_start_is_the_same_reference_with_an_adapter_over_it() -> None:
    plain, adapted = CausalLM("tiny"), CausalLM("tiny", adapter=LoraConfig(r=2, target_modules="all-linear"))
    for policy in (plain, adapted):
        policy.build()
    assert plain.fingerprint() == adapted.fingerprint() != small().fingerprint()


def test_wins_and_their_interval() -> None:
    assert answers.wins([1.0, 2.0, 3.0], [2.0, 2.0, 1.0]) == [0.0, 0.5, 1.0]
    values = [1.0] * 60 + [0.0] * 40
    low, high = answers.bootstrap(values)
    assert (low, high) == answers.bootstrap(values)
    assert low == pytest.approx(0.6 - 1.96 * (0.24 / 100) ** 0.5, abs=0.015)  # the normal interval of a proportion
    assert high == pytest.approx(0.6 + 1.96 * (0.24 / 100) ** 0.5, abs=0.015)
    assert answers.standard_error([1.0, 3.0]) == 1.0 and answers.standard_error([2.0]) == 0.0


def test_diversity_counts_pairs_of_words_over_all_answers() -> None:
    assert answers.distinct(["a b a b", "a b"]) == 2 / 4  # ab, ba, ab; ab
    assert answers.distinct(["하나", ""]) == 0.0


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("서울이에요. 더 도와드릴까요?", (2, 0)),
        ("네, 그렇습니다!", (1, 0)),
        ("알겠어요~ 감사합니다^^", (2, 0)),
        ("밥 먹었어. 그렇지 않아.", (0, 2)),
        ("수도는 서울이다.", (0, 1)),
        ("저는 갑니다. 너는 간다.", (1, 1)),
        ("사과, 배, 바다", (0, 0)),
        ("It is Seoul.", (0, 0)),
    ],
)
def test_speech_levels(text: str, levels: tuple[int, int]) -> None:
    assert answers.speech_levels(text) == levels


def test_korean_prompts_and_their_answers() -> None:
    asked = ["수도는?", "이름은?", "색은?", "What?"]
    said = ["서울이에요. 그래요.", "몰라요. 모른다.", "It is red.", "파랑이에요"]
    found = answers.korean(asked, said)
    assert found == {"korean_rate": 2 / 3, "formality": 1 / 2, "polite_rate": 3 / 4}
    assert answers.korean(["What?"], ["Red"]) == {}


# -- that looking changes nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SFT, PPO])
def test_training_is_the_same_with_and_without(kind: type, tmp_path: Path) -> None:
    plain, data = made(kind)
    fit(plain, data, max_epochs=2, default_root_dir=tmp_path)
    watched, data = made(kind)
    fit(watched, data, max_epochs=2, callbacks=[Fixed(every_n_steps=1)], default_root_dir=tmp_path)
    assert torch.equal(weights_of(plain.policy), weights_of(watched.policy))


@pytest.mark.parametrize("kind", [SFT, DPO, PPO])
def test_resumed_is_never_stopped(kind: type, tmp_path: Path) -> None:
    def run(folder: Path, epochs: int, checkpoint: Path | None = None) -> None:
        from lightning.pytorch import Trainer

        algorithm, data = made(kind)
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=False, every_n_epochs=1,
                               save_on_train_epoch_end=False)  # fmt: skip
        trainer = Trainer(accelerator="cpu", devices=1, max_epochs=epochs, enable_progress_bar=False,
                          enable_model_summary=False, logger=[MetricsCSV(folder)], default_root_dir=folder,
                          log_every_n_steps=1, num_sanity_val_steps=0,
                          callbacks=[Fixed(), RNGState(), keep])  # fmt: skip
        trainer.fit(algorithm, data, ckpt_path=checkpoint, weights_only=False)

    run(tmp_path / "whole", 2)
    first = next(tmp_path.glob("epoch=0*.ckpt"))
    (tmp_path / "again").mkdir()
    looks = (tmp_path / "whole" / "samples.jsonl").read_text()
    (tmp_path / "again" / "samples.jsonl").write_text(looks)  # as if it had been stopped later than its checkpoint
    run(tmp_path / "again", 2, first)
    assert (tmp_path / "again" / "samples.jsonl").read_text() == looks
    whole = [line.split(",") for line in (tmp_path / "whole" / "metrics.csv").read_text().splitlines()]
    again = [line.split(",") for line in (tmp_path / "again" / "metrics.csv").read_text().splitlines()]
    for name in NAMES:
        assert whole[-1][whole[0].index(name)] == again[-1][again[0].index(name)], name


def measured(kind: str, folder: str) -> dict[str, float]:
    """The last look of a run on this rank."""
    algorithm, data = made({"SFT": SFT, "PPO": PPO}[kind])
    trainer = fit(algorithm, data, callbacks=[Fixed(), FinalValidation()], default_root_dir=folder, devices=2,
                  strategy="ddp")  # fmt: skip
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("eval/")}


@pytest.mark.parametrize("kind", ["SFT", "PPO"])
def test_two_processes_measure_what_one_does(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    algorithm, data = made({"SFT": SFT, "PPO": PPO}[kind])
    trainer = fit(algorithm, data, callbacks=[Fixed(), FinalValidation()], default_root_dir=tmp_path / "one")
    first, second = ranks(measured, kind, str(tmp_path / "two"))
    assert first == second
    for name in NAMES:
        assert first[name] == pytest.approx(float(trainer.callback_metrics[name]), abs=2e-4), name
    assert len(read(tmp_path / "two" / "samples.jsonl")) == 2 * 5  # the first process alone writes


def test_dropout_is_off_in_a_look_and_back_afterwards(tmp_path: Path) -> None:
    class Seen(SFT):
        modes: Sequence[bool] = ()

        def loss(self, batch: Any) -> Any:
            self.modes = [*self.modes, self.policy.training]
            return super().loss(batch)

    algorithm = Seen(small(), optimizer=adam, lr_scheduler=None)
    data = TreeData(some_trees(8, 1), batch_size=4)
    fit(algorithm, data, callbacks=[Fixed(every_n_steps=1)], default_root_dir=tmp_path)
    assert list(algorithm.modes) == [True, True]


# -- the command line -------------------------------------------------------------------------------------------------


def test_from_the_command_line(leyden: Run, workplace: Path) -> None:
    sample = ["data", "sample", "--language", "ko"]
    assert leyden(*sample, "--kind", "instruction", "--rows", "16", "--output", "answers.jsonl")[0] == 0
    assert leyden(*sample, "--kind", "prompts", "--rows", "6", "--seed", "3", "--output", "q.jsonl")[0] == 0
    look = ["--eval.path", "q.jsonl", "--eval.reward", "Gold", "--eval.sampling.max_new_tokens", "4"]
    common = ["--config", "demo", "--config", "eval", "--data.path", "answers.jsonl", *look]
    code, _, err = leyden("fit", *common, "--trainer.max_steps", "1", "--trainer.default_root_dir", "run")
    assert code == 0 and "eval/reward" in err
    facts = json.loads((workplace / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert facts["reward"]["name"] == "Gold" and facts["prompts"] | {"fingerprint": ""} == {
        "path": "q.jsonl", "rows": 6, "fingerprint": "",
    }  # fmt: skip
    assert "korean_rate" in (workplace / "run" / "metrics.csv").read_text(encoding="utf-8")
    trained = ["--model.policy.path", "run/export", "--eval.reference.path", "tiny"]
    code, out, err = leyden("validate", *common, *trained)
    assert code == 0 and "eval/win_rate" in out and "eval/kl" in out
    code, out, err = leyden("validate", *common)
    assert code == 0 and "eval/reward" in out and "eval/kl" not in out and "--eval.reference.path" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--config", "demo", "--eval.path", "answers.jsonl"], "--eval.reward: missing"),
        (["--config", "demo", "--eval.path", "gone.jsonl", "--eval.reward", "Gold"], "gone.jsonl"),
        (["--config", "demo", "--eval.reward", "Gold"], "eval.path"),
        (["--config", "reward_model", "--data.path", "pairs.jsonl", "--eval.path", "answers.jsonl", "--eval.reward",
          "Gold"], "gives none"),
        (["--config", "demo", "--eval.path", "answers.jsonl", "--eval.reward", "Glod"], "did you mean 'Gold'"),
        (["--config", "demo", "--eval.path", "answers.jsonl", "--eval.sampling.max_new_tokens", "2000", "--eval.reward",
          "Gold"], "--eval.max_length"),
        (["--config", "demo", "--eval.pth", "answers.jsonl", "--eval.reward", "Gold"], "path"),
    ],
)  # fmt: skip
def test_mistakes(leyden: Run, workplace: Path, more: list[str], said: str) -> None:
    leyden("data", "sample", "--language", "ko", "--kind", "instruction", "--rows", "4", "--output", "answers.jsonl")
    leyden("data", "sample", "--language", "ko", "--kind", "preference", "--rows", "4", "--output", "pairs.jsonl")
    code, _, err = leyden("fit", "--data.path", "answers.jsonl", *more, "--trainer.max_steps", "1")
    assert code == 2 and said in err, err


def test_the_best_by_an_evaluation_is_kept(leyden: Run, workplace: Path) -> None:
    """The sanity check before training validates, and evaluates nothing."""
    leyden("data", "sample", "--language", "ko", "--kind", "prompts", "--rows", "4", "--output", "q.jsonl")
    leyden("data", "sample", "--language", "ko", "--kind", "preference", "--rows", "12", "--output", "pairs.jsonl")
    words = ["fit", "--config", "dpo", "--config", "eval", "--data.path", "pairs.jsonl", "--eval.path", "q.jsonl"]
    words += ["--eval.reward", "Gold", "--eval.sampling.max_new_tokens", "4", "--data.val_fraction", "0.3"]
    words += ["--trainer.max_steps", "1", "--checkpoint.mode", "max", "--trainer.default_root_dir", "run"]
    code, _, err = leyden(*words, "--checkpoint.monitor", "eval/reward")
    assert code == 0, err
    assert list((workplace / "run" / "checkpoints").glob("step=*.ckpt"))
    code, _, err = leyden(*words[:-1], "other", "--checkpoint.monitor", "eval/rewrad")
    assert code == 2 and "no such measure; did you mean 'eval/reward'" in err, err
