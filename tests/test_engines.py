"""Engines other than the policy: in step with it, proven, whole nowhere, and one rollout ahead."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import small
from test_on_policy import KINDS, Questions, algorithm, fit, read, resume, weights_of

from leyden.algos import GRPO, PPO
from leyden.checkpoint.callback import RNGState
from leyden.corrections import NoCorrection
from leyden.errors import UserError
from leyden.policy import Engine, Policy, Response, Sampling
from leyden.policy.sync_proof import SEED


class Twin(Engine):
    """Another model in the same process, which gets the policy's weights by their names, as a server would."""

    runs_policy: ClassVar[bool] = False

    def __init__(self, exact: bool = True) -> None:
        self.exact, self.calls = exact, list[str]()
        self.twin: Any = small()

    def is_exact(self, policy: Policy) -> bool:
        return self.exact

    def start(self, policy: Policy, folder: Path, longest: int) -> None:
        self.calls.append("start")

    def sync(self, policy: Policy) -> None:
        self.calls.append("sync")
        weights = {name: weight.detach().clone() for name, weight in policy.weights()}
        self.take(weights)

    def take(self, weights: dict[str, Any]) -> None:
        self.twin.model.load_state_dict(weights, strict=True)

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, keys: Sequence[int], on_progress: Any = None
    ) -> list[list[Response]]:
        self.calls.append("proof" if sampling.seed == SEED else "generate")
        found: list[list[Response]] = self.twin.generate(prompts, n, sampling, keys)
        return found

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_an_engine_samples_as_the_policy_itself(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """Weights that travel by name, and back as samples: the same rollouts and the same end, bit for bit."""
    found = []
    for name, engine in (("own", None), ("twin", Twin())):
        one = algorithm(kind, options, engine=engine, keep_rollouts=True)
        fit(one, Questions(held=2), max_epochs=3, default_root_dir=tmp_path / name)
        found.append((weights_of(one.policy), read(tmp_path / name / "rollouts.jsonl")))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    drop = [[{k: v for k, v in row.items() if k != "fingerprint"} for row in rows] for _, rows in found]
    assert drop[0] == drop[1]


def test_weights_are_sent_once_for_each_state_of_them() -> None:
    one = algorithm(PPO, {}, engine=Twin())
    fit(one, Questions(held=2), max_epochs=3, num_sanity_val_steps=2)
    # a sanity check and a rollout of the first weights; then a validation and a rollout of those after each epoch
    assert one.engine.calls.count("sync") == 4 and one.engine.calls.count("start") == 1
    assert one.engine.calls[-1] == "stop"


class Stale(Twin):
    """Takes nothing over after the first time."""

    def take(self, weights: dict[str, Any]) -> None:
        if self.calls.count("sync") == 1:
            super().take(weights)


class TiedHead(Twin):
    """Keeps its first head."""

    def take(self, weights: dict[str, Any]) -> None:
        if self.calls.count("sync") > 1:
            weights["lm_head.weight"] = self.twin.model.lm_head.weight.detach().clone()
        super().take(weights)


class Another(Twin):
    """Serves another model."""

    def take(self, weights: dict[str, Any]) -> None:
        super().take({name: weight * 1.5 for name, weight in weights.items()})


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Stale, "Stale is no longer in step with the policy: after a sync its log-probs differ by"),
        (TiedHead, "TiedHead is no longer in step"),
        (Another, "Another does not sample from this policy: its log-probs differ by"),
    ],
)
def test_a_sync_that_did_not_do_what_it_said_ends_the_run(engine: type[Twin], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(algorithm(GRPO, {"samples": 3}, engine=engine()), Questions(), max_epochs=3)


class Flaky(Twin):
    """Misses the second sync, once."""

    def take(self, weights: dict[str, Any]) -> None:
        if self.calls.count("sync") != 2:
            super().take(weights)


def test_a_sync_that_failed_once_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    one = algorithm(GRPO, {"samples": 3}, engine=Flaky())
    fit(one, Questions(), max_epochs=3)
    assert one.engine.calls.count("sync") == 4 and "it is synced again" in caplog.text


# -- one rollout ahead ----------------------------------------------------------------------------------------------


def lagging(engine: Any = None, **more: Any) -> Any:
    options = dict(samples=3, epochs=2, minibatches=2, lag=1)
    return algorithm(GRPO, options, engine=engine or Twin(), keep_rollouts=True, **more)


def test_with_a_lag_samples_are_those_of_the_weights_one_rollout_before(tmp_path: Path) -> None:
    """By hand: rollout k + 1 has the samples that the weights at the start of rollout k give."""
    one = lagging(correction=NoCorrection())
    kept: list[Any] = []
    collect = one.collect

    def keeping(number: int, drawn: Any) -> Any:
        kept.append((copy.deepcopy(one.policy), drawn))
        return collect(number, drawn)

    one.collect = keeping
    fit(one, Questions(), max_epochs=4, default_root_dir=tmp_path)
    rows = read(tmp_path / "rollouts.jsonl")
    assert [row["draw"] for row in rows] == list(range(32))
    seed = one.sampling.seed * 1_000_003
    for number in range(4):
        policy, drawn = kept[max(number - 1, 0)][0], kept[number][1]
        sampling = Sampling(one.sampling.max_new_tokens, one.sampling.temperature, seed=seed + number)
        groups = policy.generate([prompt.tokens for _, prompt in drawn], 3, sampling, [draw for draw, _ in drawn])
        mine = [row["tokens"] for row in rows if row["rollout"] == number]
        assert mine == [[response.tokens for response in group] for group in groups]
    assert not (tmp_path / "rollouts.jsonl.part").exists()


def test_what_lies_between_two_rollouts_is_corrected() -> None:
    one = lagging()
    trainer = fit(one, Questions(), max_epochs=3)
    assert float(trainer.callback_metrics["rollout/mismatch"]) > 1e-3
    assert float(trainer.callback_metrics["rollout/correction"]) != 1.0


def test_with_a_lag_resumed_is_never_stopped(tmp_path: Path) -> None:
    """From every kind of step: weights and rollouts, bit for bit, and what was sampled ahead is not sampled again."""
    whole = lagging()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    own = dict(max_epochs=4, default_root_dir=tmp_path)
    fit(whole, Questions(), callbacks=[saver, RNGState()], enable_checkpointing=True, **own)
    rollouts = (tmp_path / "rollouts.jsonl").read_bytes()
    for step in (1, 3, 4, 6, 8, 11, 13):
        trained = (step - 1) // 4  # the rollout that this step learns from; the checkpoint has the one after it
        lines = [line for line in rollouts.splitlines(True) if json.loads(line)["rollout"] <= trained]
        (tmp_path / "rollouts.jsonl").write_bytes(b"".join(lines))
        found = lagging()
        resume(found, Questions(), tmp_path / f"{step}.ckpt", callbacks=[RNGState()], **own)
        assert torch.equal(weights_of(found.policy), weights_of(whole.policy)), step
        assert (tmp_path / "rollouts.jsonl").read_bytes() == rollouts, step
        assert found.engine.calls.count("generate") == max(4 - (trained + 2), 0), step


def test_the_policy_itself_cannot_sample_ahead() -> None:
    with pytest.raises(UserError, match="--model.lag 1: .* add --config vllm"):
        algorithm(GRPO, {"samples": 3, "lag": 1})
