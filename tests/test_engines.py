"""Engines other than the policy: in step with it, proven, whole nowhere, and one rollout ahead."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Ranks
from small import LLAMA, small
from test_evaluation import Fixed, made
from test_fsdp2 import Words
from test_on_policy import KINDS, SHORT, Questions, algorithm, evens, fit, read, resume, weights_of

from leyden.algos import DPO, GRPO, PPO, SFT
from leyden.checkpoint.callback import RNGState
from leyden.corrections import NoCorrection
from leyden.datamodules import InstructionData
from leyden.errors import UserError
from leyden.models import CausalLM
from leyden.policy import Engine, Policy, Response, Sampling, sync_proof
from leyden.policy.sync_proof import SEED, SyncProof


class Twin(Engine):
    """Another model in the same process, which gets the policy's weights by their names, as a server would."""

    runs_policy: ClassVar[bool] = False
    concurrent: ClassVar[bool] = True

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


class Tiny(Twin):
    def __init__(self) -> None:
        super().__init__()
        self.twin = CausalLM("tiny")
        self.twin.build(dropout=False)

    def take(self, weights: dict[str, Any]) -> None:
        self.twin.model.load_state_dict(weights, strict=False)  # its head is tied


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


def test_log_probs_that_are_no_numbers_are_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """On whichever process: the largest of some numbers and NaN may be a number."""
    engine, policy, proof = Twin(), small(), SyncProof()
    engine.sync(policy)
    assert proof.holds(proof.measure(policy, engine, 64))
    for found in ([(1e-6, 1e-6), (math.nan, math.nan)], [(math.nan, math.nan), (1e-6, 1e-6)]):
        monkeypatch.setattr(sync_proof, "all_gather", lambda mine, found=found: found)
        assert not proof.holds(proof.measure(policy, engine, 64))


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


def test_what_lies_between_two_rollouts_is_corrected(tmp_path: Path) -> None:
    one = lagging()
    trainer = fit(one, Questions(), max_epochs=3, default_root_dir=tmp_path)
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


def test_with_a_lag_resumed_twice_is_never_stopped(tmp_path: Path) -> None:
    """A checkpoint of a resumed run still holds the rollout that was sampled ahead, before that one is trained on."""
    whole = lagging()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    own = dict(max_epochs=4, default_root_dir=tmp_path)
    fit(whole, Questions(), callbacks=[saver, RNGState()], enable_checkpointing=True, **own)
    rollouts = (tmp_path / "rollouts.jsonl").read_bytes()
    lines = [line for line in rollouts.splitlines(True) if json.loads(line)["rollout"] <= 1]
    (tmp_path / "rollouts.jsonl").write_bytes(b"".join(lines))
    saver = ModelCheckpoint(
        tmp_path, "again-{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )
    first, own_first = lagging(), dict(own, max_steps=7, callbacks=[saver, RNGState()], enable_checkpointing=True)
    resume(first, Questions(), tmp_path / "5.ckpt", **own_first)
    second = lagging()
    resume(second, Questions(), tmp_path / "again-7.ckpt", callbacks=[RNGState()], **own)
    assert torch.equal(weights_of(second.policy), weights_of(whole.policy))
    assert (tmp_path / "rollouts.jsonl").read_bytes() == rollouts


def test_the_policy_itself_cannot_sample_ahead() -> None:
    with pytest.raises(UserError, match="--model.lag 1: .* add --config vllm"):
        algorithm(GRPO, {"samples": 3, "lag": 1})


# -- several processes ----------------------------------------------------------------------------------------------


DEEP = LLAMA | {"num_hidden_layers": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("deep"))
    small(options=DEEP).model.save_pretrained(path)
    return path


def from_folder(path: str) -> CausalLM:
    policy = CausalLM(path)
    policy._tokenizer = Words()  # type: ignore[assignment]
    return policy


class DeepTwin(Twin):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.twin = from_folder(path)
        self.twin.build(dropout=False)


def deep(path: str, lag: int, value: dict[str, Any], engine: Engine | None) -> Any:
    kind = PPO if value else GRPO
    options = dict(samples=2, minibatches=2, epochs=1, lag=lag, sampling=SHORT, reward=evens, lr_scheduler=None)
    options |= dict(keep_rollouts=False)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
    return kind(from_folder(path), engine=engine, optimizer=optimizer, **(options | value))


@contextmanager
def most_whole() -> Iterator[list[int]]:
    """The most elements of sharded weights that were whole at a time: put together by FSDP2, or to be sent."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    from leyden.models.saving import whole_weights

    whole, sent, most = dict[int, int](), list[Any](), [0, 0]
    together, apart, full = FSDPParam.to_unsharded, FSDPParam.to_sharded, whole_weights.full_tensor

    def to_unsharded(param: Any) -> None:
        together(param)
        whole[id(param)] = param._orig_size.numel()
        most[0] = max(most[0], sum(whole.values()))

    def to_sharded(param: Any) -> None:
        apart(param)
        whole.pop(id(param), None)

    def full_tensor(x: torch.Tensor) -> torch.Tensor:
        sent.append(weakref.ref(found := full(x)))
        most[1] = max(most[1], sum(one.numel() for ref in sent if (one := ref()) is not None))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPParam, "to_unsharded", to_unsharded)
        patch.setattr(FSDPParam, "to_sharded", to_sharded)
        patch.setattr(whole_weights, "full_tensor", full_tensor)
        yield most


def sharded_on_rank(path: str, lag: int, value: dict[str, Any], own: bool) -> tuple[list[int], Any]:
    from leyden.distributed import full_tensor
    from leyden.sharding import FSDP2

    found = deep(path, lag, value, None if own else DeepTwin(path))
    options = dict(devices=2, strategy=FSDP2(process_group_backend="gloo"), use_distributed_sampler=False)
    with most_whole() as most:
        fit(found, Questions(held=3), max_epochs=2, **options)
    return most, torch.cat([full_tensor(p.detach()).flatten() for p in found.policy.parameters()])


@pytest.mark.parametrize(("lag", "value"), [(0, {}), (1, {}), (0, {"value": "head"})])
def test_a_sharded_model_is_whole_on_no_process(lag: int, value: dict[str, Any], folder: str, ranks: Ranks) -> None:
    """With an engine no process puts the model together to sample, to score or to send it: never more than what stands
    outside of the blocks, the reference's too, and two blocks, one of which is fetched ahead. The end is that of one
    process."""
    one = deep(folder, lag, value, DeepTwin(folder))
    fit(one, Questions(held=3), max_epochs=2)
    for most, weights in ranks(sharded_on_rank, folder, lag, value, False):
        torch.testing.assert_close(weights, weights_of(one.policy), rtol=1e-4, atol=1e-5)
        blocks = one.policy.backbone.blocks()
        size = sum(p.numel() for p in blocks[0].parameters())
        rest = sum(p.numel() for p in one.policy.parameters()) - size * len(blocks)
        assert most[0] <= 2 * (rest + size) and most[1] <= max(rest, 2 * size)


def test_the_policy_itself_is_put_together_to_sample(folder: str, ranks: Ranks) -> None:
    """What the test before this one measures, where it has to be so."""
    total = sum(p.numel() for p in small(options=DEEP).parameters())
    assert [most[0] for most, _ in ranks(sharded_on_rank, folder, 0, {}, True)] == [2 * total] * 2  # and the reference


# -- beside rollouts: evaluations and predictions of any algorithm -------------------------------------------------


@pytest.mark.parametrize("kind", [SFT, DPO])
def test_evaluations_ask_the_engine(kind: type, tmp_path: Path) -> None:
    """The measures of every pass are those of the policy itself, and each state of the weights is sent once."""
    found = []
    for engine in (None, Twin()):
        one, data = made(kind, engine=engine)
        trainer = fit(one, data, max_steps=2, callbacks=[Fixed(every_n_steps=1)], default_root_dir=tmp_path)
        found.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("eval/")})
    assert found[0] == found[1] and "eval/reward" in found[0]
    assert one.engine.calls.count("sync") == 3 <= one.engine.calls.count("generate")  # before, and after each step


def test_predictions_ask_the_engine(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(5)), encoding="utf-8")
    found = []
    for engine in (None, tiny := Tiny()):
        one = SFT(CausalLM("tiny"), sampling=Sampling(6, temperature=0.0), engine=engine)
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        found.append(trainer.predict(one, InstructionData(str(file), predict_size=2)))
    assert found[0] == found[1] and tiny.calls.count("sync") == 1 and tiny.calls.count("generate") == 3
    assert tiny.calls[-1] == "stop"
