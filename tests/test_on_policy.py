"""Rollouts: who samples what, what is kept of it, and that resuming, ranks and batch sizes change nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from ranks import Ranks
from small import fit, small, teacher, weights_of
from toy import Bigrams, Toy, ToyData

from leyden.advantages import LeaveOneOut, Whitened
from leyden.algos import GRPO, PPO, Distillation, OnlineDPO, RejectionSampling
from leyden.batch.forest import Tree, pack
from leyden.batch.trajectory import Trajectory
from leyden.checkpoint.callback import RNGState
from leyden.data import Prompt, PromptLoader
from leyden.data.datamodule import DataModule
from leyden.divergences import SampledReverseKL
from leyden.errors import UserError
from leyden.example import Example, Sample
from leyden.objectives import IPO, ORPO, Objective, Sigmoid, SimPO
from leyden.on_policy import (
    AnsweredPrompt,
    KLController,
    OnPolicy,
    PolicyGradient,
    Rollout,
    RolloutLoader,
    ScoreTransform,
)
from leyden.on_policy.metrics import rollout_metrics, rollout_sums
from leyden.on_policy.rollout_file import RolloutFile
from leyden.on_policy.rollout_loader import check_room
from leyden.policy import Native, Response, Sampling
from leyden.run.callbacks import FinalValidation, Throughput
from leyden.run.flops import flops_per_token
from leyden.run.progress import Progress, RunEstimate
from leyden.surrogates import CISPO, Clip, SequenceRatio

SHORT = Sampling(max_new_tokens=6, temperature=0.7)
KINDS: list[tuple[type[OnPolicy], dict[str, Any]]] = [
    (PPO, {"samples": 1, "epochs": 2, "minibatches": 2}),
    (GRPO, {"samples": 3, "epochs": 2, "minibatches": 2}),
    (RejectionSampling, {"samples": 3, "epochs": 2, "minibatches": 2}),
    (Distillation, {"samples": 2, "epochs": 2, "minibatches": 2, "given": 0.4}),
    (Distillation, {"samples": 3, "epochs": 2, "minibatches": 2, "divergence": SampledReverseKL()}),
    (OnlineDPO, {"samples": 3, "epochs": 2, "minibatches": 2}),
]
SETTINGS: list[tuple[type[OnPolicy], dict[str, Any]]] = [
    (
        GRPO,
        {
            "samples": 2,
            "epochs": 2,
            "minibatches": 2,
            "surrogate": Clip(0.2, 0.28, 3.0),
            "score": ScoreTransform(overlong=0.5),
            "mask_truncated": True,
            "dynamic_sampling": 2,
        },
    ),
    (
        PolicyGradient,
        {
            "samples": 2,
            "epochs": 2,
            "minibatches": 2,
            "estimator": Whitened(),
            "surrogate": SequenceRatio(),
            "average": "responses",
        },
    ),
    (
        PolicyGradient,
        {
            "samples": 3,
            "epochs": 2,
            "minibatches": 2,
            "estimator": LeaveOneOut(),
            "surrogate": CISPO(),
            "average": "constant",
            "kl": "k3",
        },
    ),
]
"""Settings of policy gradients that other tests have to hold for, too."""


def evens(samples: Sequence[Sample]) -> list[float]:
    """Share of even tokens."""
    return [sum(int(word) % 2 == 0 for word in s.response.split()) / max(len(s.response.split()), 1) for s in samples]


class Questions(DataModule):
    """Prompts of two to nine numbers."""

    def __init__(self, size: int = 8, count: int = 12, seed: int = 0, held: int = 0) -> None:
        super().__init__(size, 4096, seed)
        generator = torch.Generator().manual_seed(9)
        rows = [torch.randint(1, 97, (2 + i % 8,), generator=generator).tolist() for i in range(count + held)]
        prompts = [
            Prompt(i, Example([], source=f"q.jsonl:{i + 1}", row={"n": i}), row, [*row[: i % 4], 0])
            for i, row in enumerate(rows)
        ]
        self.prompts, self.held = prompts[:count], prompts[count:]

    def source(self, row: int) -> str:
        return f"q.jsonl:{row + 1}"

    def train_dataloader(self) -> Any:
        return self._trainer().lightning_module.experience(PromptLoader(self.prompts, self.batch_size, self.seed))

    def val_dataloader(self) -> Any:  # a plain list would be several loaders
        return torch.utils.data.DataLoader(self.held, batch_size=3, collate_fn=list) if self.held else []


def algorithm(kind: type[OnPolicy], options: dict[str, Any], **more: Any) -> Any:
    given: dict[str, Any] = dict(reward=evens, sampling=SHORT, keep_rollouts=False, lr_scheduler=None)
    given["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
    if kind is Distillation:
        given |= dict(teacher=teacher())
    return kind(small(), **(given | options | more))


class Watched(PPO):
    """Keeps what every step logged, and how far the weights were then."""

    def on_step_metrics(self, now: Any) -> None:
        super().on_step_metrics(now)
        self.seen = [*getattr(self, "seen", []), dict(now)]
        self.weights = [*getattr(self, "weights", []), weights_of(self.policy)]


# -- prompts and trajectories --------------------------------------------------------------------------------------


def test_every_prompt_comes_once_a_pass() -> None:
    prompts = [Prompt(i, Example([]), [i]) for i in range(10)]
    loader = PromptLoader(prompts, 4, seed=3)
    drawn = [pair for rollout in range(5) for pair in loader.draw(rollout)]
    assert [number for number, _ in drawn] == list(range(20)) and len(loader) == 3
    first, second = ([p.row for _, p in drawn[at : at + 10]] for at in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [p.row for _, p in PromptLoader(prompts, 5, seed=3).draw(1)] == first[5:]


def test_joined_rollouts_are_one() -> None:
    trees = [Tree([1, 2], [[3], [4, 5]], [1.0, 2.0], row=7), Tree([6], [[7, 8]], [3.0], row=8), Tree([9], [[1]], row=9)]
    whole = Trajectory.cat([Trajectory.of(trees[:1]), Trajectory.of(trees[1:])])
    expected = pack(trees)
    for name in ("tokens", "position", "parent", "end", "branch", "weight", "group", "score", "row"):
        assert torch.equal(getattr(whole, name), getattr(expected, name)), name
    assert whole.totals == expected.totals and whole.structure() == expected.structure()
    again = Trajectory.from_state_dict(whole.state_dict())
    assert torch.equal(again.tokens, whole.tokens) and again.structure() == whole.structure()
    at, mask = whole.grid()
    assert whole.tokens[at][mask].tolist() == [3, 4, 5, 7, 8, 1] and mask.sum(1).tolist() == [1, 2, 2, 1]
    assert whole.per_token(whole.score).tolist() == [0, 0, 1, 2, 2, 0, 3, 3, 0, 0]


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minibatches", [1, 4])
def test_every_minibatch_is_a_step_and_the_first_ratio_is_one(minibatches: int) -> None:
    """At temperature 0.7, where sampling at one temperature and scoring at another would show."""
    found = algorithm(Watched, {"epochs": 2, "minibatches": minibatches})
    before = weights_of(found.policy)
    trainer = fit(found, Questions(), max_epochs=2)
    assert trainer.global_step == 2 * 2 * minibatches == len(found.seen)
    assert abs(found.seen[0]["policy/approx_kl"]) < 1e-9 and found.seen[0]["policy/clip_fraction"] == 0
    after = [before, *found.weights]
    assert all(not torch.equal(a, b) for a, b in zip(after[1:], after[2:], strict=False))


class Rated(PPO):
    """Keeps how far the ratios of its first minibatch are from 1."""

    far: float | None = None

    def policy_loss(self, batch: Trajectory, out: Any) -> torch.Tensor:
        if self.far is None:
            self.far = float(((out.logp.detach() - batch.old_logp).exp() - 1).abs().max())
        return super().policy_loss(batch, out)


def test_the_first_minibatch_has_ratios_of_one() -> None:
    """Its rows are packed otherwise than when they were looked at, and all but rounding is the same."""
    found = algorithm(Rated, {"samples": 2, "minibatches": 4})
    fit(found, Questions())
    assert found.far is not None and found.far < 1e-5


def test_old_log_probs_are_those_of_the_sampled_distribution() -> None:
    """The training path says of a response what decoding said when it was sampled, at its temperature."""
    found = algorithm(GRPO, {"samples": 4})
    groups = found.policy.generate([[5, 6, 7], [8]], 4, SHORT)
    trees = [Tree(p, [r.tokens for r in g], [0.0] * 4) for p, g in zip([[5, 6, 7], [8]], groups, strict=True)]
    found._agreed, found.reference = True, found.policy.reference("copy")
    with torch.no_grad():
        seen = found.compute_log_probs(Trajectory.of(trees))
    said = torch.tensor([lp for g in groups for r in g for lp in r.logp])
    torch.testing.assert_close(seen.old_logp[seen.branch >= 0], said, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.ref_logp, seen.old_logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "options"), [*KINDS, *SETTINGS])
def test_accumulation_changes_nothing(kind: type[OnPolicy], options: dict[str, Any]) -> None:
    ends = []
    for accumulate in (1, 2):
        found = algorithm(kind, options)
        fit(found, Questions(), max_epochs=2, accumulate_grad_batches=accumulate)
        ends.append(weights_of(found.policy))
    torch.testing.assert_close(ends[0], ends[1], atol=2e-5, rtol=0)


def on_rank(kind: str, options: dict[str, Any], folder: str) -> tuple[torch.Tensor, list[Any]]:
    from lightning.pytorch.strategies import DDPStrategy

    found = algorithm({k.__name__: k for k, _ in [*KINDS, *SETTINGS]}[kind], options, keep_rollouts=True)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=kind == "PPO")
    fit(found, Questions(), max_epochs=2, devices=2, strategy=strategy, default_root_dir=folder)
    rows = [row for file in sorted(Path(folder).glob("rollouts*.jsonl")) for row in read(file)]
    return weights_of(found.policy), [[row["draw"], row["tokens"]] for row in rows]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("kind", "options"), [*KINDS, *SETTINGS])
def test_two_processes_sample_and_learn_what_one_does(
    kind: type[OnPolicy], options: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    one = algorithm(kind, options, keep_rollouts=True)
    fit(one, Questions(), max_epochs=2, default_root_dir=tmp_path / "one")
    two = ranks(on_rank, kind.__name__, options, str(tmp_path / "two"))
    torch.testing.assert_close(two[0][0], two[1][0], atol=0, rtol=0)
    torch.testing.assert_close(two[0][0], weights_of(one.policy), atol=2e-5, rtol=0)
    alone = [[row["draw"], row["tokens"]] for row in read(tmp_path / "one" / "rollouts.jsonl")]
    assert sorted(two[0][1]) == alone


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PPO, {"minibatches": 2, "kl_target": 0.05, "kl_horizon": 10.0, "score": ScoreTransform(1.0, True, 2.0)}),
        (GRPO, {"samples": 3, "minibatches": 2, "scale": True}),
        (RejectionSampling, {"samples": 3, "minibatches": 2, "threshold": 0.6}),  # many prompts keep no answer
    ],
)
def test_sums_over_a_shared_rollout_are_those_of_the_whole(
    kind: type[OnPolicy], options: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    """Moments of scores, the KL, whitening, and prompts that are left out on one process alone."""
    one = algorithm(kind, copy.deepcopy(options), keep_rollouts=True)  # moments of scores are kept in the options
    trainer = fit(one, Questions(), max_epochs=3, default_root_dir=tmp_path / "one")
    two = ranks(shared_on_rank, kind.__name__, options, str(tmp_path / "two"))
    torch.testing.assert_close(two[0][0], two[1][0], atol=0, rtol=0)
    torch.testing.assert_close(two[0][0], weights_of(one.policy), atol=2e-5, rtol=0)
    alone = rollout_numbers(trainer)
    assert two[0][1] == two[1][1] and two[0][1].keys() == alone.keys() and len(alone) > 6
    for name, value in alone.items():
        assert two[0][1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def rollout_numbers(trainer: Any) -> dict[str, float]:
    names = ("rollout/", "ppo/explained")
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(names)}


def shared_on_rank(kind: str, options: dict[str, Any], folder: str) -> tuple[torch.Tensor, dict[str, float]]:
    from lightning.pytorch.strategies import DDPStrategy

    found = algorithm({k.__name__: k for k, _ in [*KINDS, *SETTINGS]}[kind], options, keep_rollouts=True)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=kind == "PPO")
    trainer = fit(found, Questions(), max_epochs=3, devices=2, strategy=strategy, default_root_dir=folder)
    return weights_of(found.policy), rollout_numbers(trainer)


class Shares:
    """Two processes in one, run again and again: each time a sum is that of what both said at the same call before."""

    def __init__(self) -> None:
        self.before: list[list[torch.Tensor]] = [[], []]
        self.now: list[list[torch.Tensor]] = [[], []]

    def again(self) -> None:
        self.before, self.now = self.now, [[], []]

    def reduce(self, rank: int) -> Any:
        def total(x: torch.Tensor) -> torch.Tensor:
            call = len(self.now[rank])
            self.now[rank].append(x)
            return self.before[0][call] + self.before[1][call] if self.before[0] else x

        return total


@pytest.mark.parametrize("dropped", [5, 10**9])
@pytest.mark.parametrize(("size", "passes", "minibatches"), [(8, 1, 4), (16, 3, 4), (128, 4, 4), (6, 2, 1)])
def test_a_shared_rollout_has_the_steps_of_the_whole(size: int, passes: int, minibatches: int, dropped: int) -> None:
    """For each step: the same prompts, none on both processes, the same totals; and unless some prompts keep no answer,
    about equally many on each process."""
    generator = torch.Generator().manual_seed(1)
    prompts = [
        Prompt(i, Example([]), torch.randint(1, 97, (2 + i % 5,), generator=generator).tolist()) for i in range(9)
    ]

    def collect(rollout: int, drawn: list[tuple[int, Prompt]]) -> Trajectory:
        trees = [
            Tree(p.tokens, [[1 + n % 90] * (1 + n % 7)], [float(n)], row=p.row) for n, p in drawn if (n + 1) % dropped
        ]
        return Trajectory.of(trees, draws=[n for n, _ in drawn if (n + 1) % dropped])

    def batches(world: int, rank: int, reduce: Any) -> list[list[Trajectory]]:
        loader = RolloutLoader(collect, PromptLoader(prompts, size, 3), passes, minibatches, 1, world, rank, reduce)
        return [list(loader) for _ in range(3)]

    alone, shares = batches(1, 0, lambda x: x), Shares()
    for _ in range(3):  # which prompts keep answers, then totals, then what both make of them
        both = [batches(2, rank, shares.reduce(rank)) for rank in (0, 1)]
        shares.again()
    for rollout in range(3):
        for step in range(passes * minibatches):
            whole, first, second = (x[rollout][step] for x in (alone, *both))
            assert whole.totals == first.totals == second.totals
            mine, other, every = (sorted(x.score.tolist()) for x in (first, second, whole))
            assert sorted(mine + other) == every
            assert dropped == 5 or abs(len(mine) - len(other)) <= max(2, len(every) // 8)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("size", [4, 12, 16])
def test_a_rollout_in_training_keeps_its_size(size: int, world: int) -> None:
    """A run that goes on with another number of prompts a rollout ends the one that it is in first."""
    prompts = [Prompt(i, Example([]), [1 + i] * (2 + i % 5)) for i in range(9)]

    def collect(rollout: int, drawn: list[tuple[int, Prompt]]) -> Trajectory:
        trees = [Tree(prompt.tokens, [[5]], [float(n)], row=prompt.row) for n, prompt in drawn]
        return Trajectory.of(trees, draws=[n for n, _ in drawn])

    def loaders(size: int) -> list[RolloutLoader]:
        return [RolloutLoader(collect, PromptLoader(prompts, size, 3), 2, 4, 1, world, rank) for rank in range(world)]

    before, after = loaders(8), loaders(size)
    for _ in range(2):  # two rollouts, and three steps of the third
        for loader in before:
            list(loader)
    running = [iter(loader) for loader in before]
    for _ in range(3):
        for one in running:
            next(one)
    parts = [loader.batch for loader in before]
    assert all(part is not None for part in parts)
    state = before[0].state_dict() | {"trajectory": Trajectory.cat(parts).state_dict()}  # type: ignore[arg-type]
    for loader, rest in zip(after, running, strict=True):
        loader.load_state_dict(state)
        expected, found = list(rest), list(loader)
        assert [x.draw.tolist() for x in found] == [x.draw.tolist() for x in expected]
        assert sum(len(x) for x in loader) > 0 and loader.batch is not None  # and the next one has the new size
        assert all(3 * size <= draw < 4 * size for draw in loader.batch.draw.tolist())


def test_more_processes_than_prompts_are_an_error() -> None:
    one = SimpleNamespace(minibatches=1, budget=100, trained_on=1)
    prompts = [Prompt(0, Example([]), [1, 2])]
    loader = RolloutLoader(lambda *_: Trajectory.of([]), PromptLoader(prompts, 2, 0), 1, 1, 1, world=3)
    with pytest.raises(UserError, match="--data.batch_size 2 prompts are fewer than the 3 processes"):
        check_room(one, loader)


def test_terms_of_a_reward_are_means_over_the_responses_that_have_them() -> None:
    """Two processes: a term that only the second has, of two of its three responses."""
    batch = Trajectory.of([Tree([1], [[5]], [1.0])], [[[0.0]]])
    parts = [[({}, 1.0)], [({"a": [2.0]}, 1.0), ({"a": [4.0]}, 2.0), ({}, 3.0)]]
    sums = []
    for part in parts:
        found = [
            AnsweredPrompt(Prompt(0, Example([]), [1]), n, [Response([5], [0.0], True, "x")], [score], terms)
            for n, (terms, score) in enumerate(part)
        ]
        sums.append(rollout_sums(Rollout(0, found, batch), ["a"]))
    assert sums[0].keys() == sums[1].keys()
    metrics = rollout_metrics({name: sums[0][name] + sums[1][name] for name in sums[0]})
    assert metrics["rollout/reward_a"] == 3.0 and metrics["rollout/reward"] == 7 / 4


def test_an_engine_gives_a_log_prob_for_each_token() -> None:
    class Silent(Native):
        def generate(self, *args: Any) -> Any:
            return [[replace(one, logp=[]) for one in group] for group in super().generate(*args)]

    with pytest.raises(UserError, match="Silent: a response of . tokens with 0 log-probs"):
        fit(algorithm(PPO, {}, engine=Silent()), Questions(), max_epochs=1)


class Meeting(Native):
    """An engine whose processes wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def sync(self, policy: Any) -> None:
        self.calls.append("sync")
        torch.distributed.barrier()
        super().sync(policy)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("generate")
        return super().generate(*args, **kwargs)


class Uneven(Questions):
    """One prompt is held out, and the first process alone has it, in two batches of which one is empty."""

    def val_dataloader(self) -> Any:
        mine = self.held if self._trainer().global_rank == 0 else []
        return torch.utils.data.DataLoader([mine, []], batch_size=None)  # type: ignore[arg-type]


def meeting_on_rank() -> list[str]:
    from lightning.pytorch.strategies import DDPStrategy

    found = algorithm(PPO, {}, engine=Meeting())
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    options = dict(devices=2, strategy=strategy, use_distributed_sampler=False, num_sanity_val_steps=0)
    fit(found, Uneven(held=1), max_epochs=1, **options)
    return found.engine.calls  # type: ignore[no-any-return]


def test_an_engine_is_synced_on_every_process_once(ranks: Ranks) -> None:
    first, second = ranks(meeting_on_rank, timeout=60.0)
    assert first == ["sync", "generate"] * 2  # the rollout, the validation
    assert second == ["sync", "generate", "sync"]


def test_the_samplers_own_account_travels_and_is_compared(tmp_path: Path) -> None:
    """An engine whose log-probs are off by a tenth of a nat is seen; the policy itself is not."""

    class Off(Native):
        def generate(self, *args: Any) -> Any:
            groups = super().generate(*args)
            return [[replace(r, logp=[lp - 0.1 for lp in r.logp]) for r in group] for group in groups]

    found = []
    for name, engine in (("own", None), ("off", Off())):
        one = algorithm(PPO, {"samples": 2}, engine=engine, keep_rollouts=True)
        trainer = fit(one, Questions(), max_epochs=1, default_root_dir=tmp_path / name)
        found.append(float(trainer.callback_metrics["rollout/mismatch"]))
        rows = read(tmp_path / name / "rollouts.jsonl")
        assert all([len(t) for t in row["tokens"]] == [len(lp) for lp in row["logp"]] for row in rows)
    assert found[0] < 1e-5 and found[1] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize(("kind", "options"), [*KINDS, *SETTINGS])
def test_resumed_is_never_stopped(kind: type[OnPolicy], options: dict[str, Any], tmp_path: Path) -> None:
    """From every step, in the middle of a rollout and between two: weights, prices and rollouts, bit for bit."""
    more: dict[str, Any] = dict(keep_rollouts=True)
    if issubclass(kind, PolicyGradient):
        options = {"score": ScoreTransform(normalise=True)} | options
        more |= dict(kl_target=0.05, kl_horizon=10.0)
    whole = algorithm(kind, copy.deepcopy(options), **more)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    callbacks = [saver, RNGState(), Throughput()]
    fit(whole, Questions(), max_epochs=3, callbacks=callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
    rollouts = (tmp_path / "rollouts.jsonl").read_bytes()
    for step in (1, 3, 4, 7, 11):
        found = algorithm(kind, copy.deepcopy(options), **more)
        found_at = dict(max_epochs=3, callbacks=[RNGState(), Throughput()], default_root_dir=tmp_path)
        resume(found, Questions(), tmp_path / f"{step}.ckpt", **found_at)
        assert torch.equal(weights_of(found.policy), weights_of(whole.policy)), step
        assert (tmp_path / "rollouts.jsonl").read_bytes() == rollouts
        if issubclass(kind, PolicyGradient):
            assert found.kl_controller == whole.kl_controller and found.score_transform == whole.score_transform


def stopped_on_rank(kind: str, options: dict[str, Any], folder: str, start: str | None) -> torch.Tensor:
    from lightning.pytorch.strategies import DDPStrategy

    found = algorithm({k.__name__: k for k, _ in [*KINDS, *SETTINGS]}[kind], options, keep_rollouts=True)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=kind == "PPO")
    own = dict(devices=2, strategy=strategy, default_root_dir=folder, max_epochs=3)
    if start is None:
        fit(found, Questions(), callbacks=[saver, RNGState()], enable_checkpointing=True, **own)
    else:
        resume(found, Questions(), Path(folder) / start, callbacks=[RNGState()], **own)
    return weights_of(found.policy)


@pytest.mark.parametrize(("kind", "options"), [*KINDS, *SETTINGS])
def test_two_processes_resume_in_the_middle_of_a_rollout(
    kind: type[OnPolicy], options: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    whole = ranks(stopped_on_rank, kind.__name__, options, str(tmp_path), None)
    for step in (3, 8):
        again = ranks(stopped_on_rank, kind.__name__, options, str(tmp_path), f"{step}.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True)), step


def resume(algorithm: Any, data: Any, checkpoint: Path, **options: Any) -> None:
    from lightning.pytorch import Trainer

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    Trainer(accelerator="cpu", **(dict(devices=1) | quiet | options)).fit(
        algorithm, data, ckpt_path=checkpoint, weights_only=True
    )


def test_a_rollout_that_broke_off_is_not_sampled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sampled when a reward failed is on file, is scored when the run comes back, and the end is the same."""
    for module in ("on_policy.sampler", "policy.engine"):
        monkeypatch.setattr(f"leyden.{module}.CHUNK", 4)
    whole = algorithm(PPO, {"samples": 2}, keep_rollouts=True)
    fit(whole, Questions(), max_epochs=1, default_root_dir=tmp_path / "whole")
    calls: list[int] = []

    def failing(samples: Sequence[Sample]) -> list[float]:
        calls.append(len(samples))
        if len(calls) == 3:
            raise ConnectionError("the judge is away")
        return evens(samples)

    broken = algorithm(PPO, {"samples": 2}, keep_rollouts=True, reward=failing)
    with pytest.raises(UserError, match=r"q\.jsonl:\d+.*failed with ConnectionError: the judge is away"):
        fit(broken, Questions(), max_epochs=1, default_root_dir=tmp_path / "run")
    rows = read(tmp_path / "run" / "rollouts.jsonl")
    assert [row["scores"] is None for row in rows] == [False] * 4 + [True] * 2
    asked: list[int] = []
    again = algorithm(PPO, {"samples": 2}, keep_rollouts=True)
    sample = again.policy.generate
    again.policy.generate = lambda *a: asked.append(len(a[0])) or sample(*a)
    fit(again, Questions(), max_epochs=1, default_root_dir=tmp_path / "run")
    assert sum(asked) == 2
    assert torch.equal(weights_of(again.policy), weights_of(whole.policy))
    kept = read(tmp_path / "run" / "rollouts.jsonl")
    assert sorted(r["draw"] for r in kept) == list(range(8)) and all(r["scores"] for r in kept)


def stopped(limit: float | None, devices: int = 1) -> tuple[list[float], list[torch.Tensor], int]:
    """approx_kl of every step, the weights before each and after the last, and how many steps there were."""
    found = algorithm(Watched, {"epochs": 4, "minibatches": 2, "stop_kl": limit})
    trainer = fit(found, Questions(), max_epochs=2, devices=devices)
    assert trainer.current_epoch == 2 and trainer.global_step == len(found.seen)
    return [now["policy/approx_kl"] for now in found.seen], [*found.weights, weights_of(found.policy)], len(found.seen)


def stopped_on_ranks(limit: float) -> tuple[list[float], list[torch.Tensor], int]:
    return stopped(limit, devices=2)


def test_stop_kl_leaves_the_step_and_the_rest_of_a_rollout_out(ranks: Ranks) -> None:
    """The weights that were measured are those that stay, on every process."""
    limit = sorted(stopped(None)[0][:8])[4]
    for kl, weights, steps in (stopped(limit), *ranks(stopped_on_ranks, limit)):
        over = [at for at, value in enumerate(kl) if value > limit]
        assert over and steps < 16
        assert all(torch.equal(weights[at], weights[at + 1]) for at in over)
        assert all(not torch.equal(weights[at], weights[at + 1]) for at in range(steps) if at not in over)


def test_a_validation_that_is_due_comes_also_when_a_rollout_is_left_early() -> None:
    found = algorithm(Watched, {"epochs": 4, "minibatches": 2, "stop_kl": 1e-12})
    told: list[int] = []
    found.on_validation_end = lambda: told.append(found.global_step)
    fit(found, Questions(held=3), max_epochs=4, check_val_every_n_epoch=2, callbacks=[FinalValidation()],
        num_sanity_val_steps=0)  # fmt: skip
    steps = len(found.seen)
    assert steps < 4 * 8 and len(told) == 2 and told[-1] == steps


def test_lora_policy_and_its_reference(tmp_path: Path) -> None:
    """The reference stays what the policy was, and the KL starts at nothing."""
    from small import some_trees

    found = algorithm(PPO, {"epochs": 2})
    policy = found.policy
    from peft import get_peft_model

    policy.adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    policy.model = get_peft_model(policy.model, policy.adapter)
    batch = pack(some_trees(3))
    with torch.no_grad():
        before = policy(batch).logp
    fit(found, Questions(), max_epochs=2)
    assert found.reference is not None and found.reference.kind == "adapter_off"
    with torch.no_grad():
        assert torch.equal(found.reference(batch), before) and not torch.equal(policy(batch).logp, before)


def test_held_out_prompts_are_answered_the_same_every_time() -> None:
    found = algorithm(PPO, {})
    trainer = fit(found, Questions(held=5), max_epochs=1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert set(logged) == {"val/reward", "val/kl", "val/length", "val/eos_rate"} and 0 <= logged["val/reward"] <= 1
    trainer.validate(found, Questions(held=5), verbose=False)
    assert logged["val/reward"] == pytest.approx(float(trainer.callback_metrics["val/reward"]))


def test_what_is_not_training_is_no_part_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock where scoring takes a second, a step a second and every validation a hundred."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def after(seconds: float) -> None:
        now[0] += seconds

    class Slow(Callback):
        def on_validation_epoch_end(self, *_: Any) -> None:
            after(100)

        def on_train_batch_end(self, *_: Any) -> None:
            after(1)

    def reward(samples: Sequence[Sample]) -> list[float]:
        after(1)
        return evens(samples)

    found = algorithm(PPO, {"minibatches": 2}, reward=reward)
    trainer = fit(found, Questions(held=5), max_epochs=3, callbacks=[Slow()])
    assert now[0] > 300 and float(trainer.callback_metrics["perf/rollout_share"]) == pytest.approx(1 / 3)


class Estimated(RunEstimate):
    """Keeps the steps at which it would print."""

    def __init__(self) -> None:
        super().__init__(after=0.0, steps=2)
        self.steps_seen: list[int] = []

    def _print(self, trainer: Any, pl_module: Any, seconds: float) -> None:
        self.steps_seen.append(trainer.global_step)


def test_the_estimate_waits_for_a_whole_rollout(tmp_path: Path) -> None:
    """Until then the longest answers may still come."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": [1, 2], "response": [3]}\n' * 10, encoding="utf-8")
    sampled, planned = Estimated(), Estimated()
    fit(algorithm(PPO, {"minibatches": 4}), Questions(), max_epochs=2, callbacks=[sampled])
    fit(Toy(Bigrams()), ToyData(str(rows), batch_size=2), max_epochs=1, callbacks=[planned])
    assert (sampled.steps_seen, planned.steps_seen) == ([4], [2])


def test_the_arithmetic_of_a_step_has_no_reference_where_it_was_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.run.callbacks.peak_flops", lambda device: 1e9)
    measured, found = Throughput(), algorithm(PPO, {"minibatches": 2})
    fit(found, Questions(), max_epochs=1, callbacks=[measured])
    assert found.has_reference and measured._share == flops_per_token(found.policy) / 1e9


# -- dynamic sampling -----------------------------------------------------------------------------------------------


def tied(samples: Sequence[Sample]) -> list[float]:
    """Answers to prompts of even numbers all score alike."""
    return [float(s.row["n"] % 2 and len(s.response)) for s in samples]


def replaced(tmp_path: Path, **options: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    given = {"samples": 3, "dynamic_sampling": 3} | options
    found = algorithm(GRPO, given, reward=given.pop("reward", tied), keep_rollouts=True)
    trainer = fit(found, Questions(4), max_epochs=2, default_root_dir=tmp_path)
    return found, trainer, read(tmp_path / "rollouts.jsonl")


def test_prompts_whose_answers_score_alike_are_replaced_by_the_next(tmp_path: Path) -> None:
    found, trainer, rows = replaced(tmp_path)
    trained = found.rollout_loader.batch
    assert sorted(trained.draw.tolist()) == sorted(found.rollout_loader.draws)
    scores = {row["draw"]: row["scores"] for row in rows}
    assert all(max(scores[draw]) > min(scores[draw]) for draw in trained.draw.tolist())
    # nothing was drawn twice, nothing left out, and no more than it took
    assert sorted(scores) == list(range(len(scores))) and len(scores) == 8 + found.rollout_loader.replacements
    by_rollout = [[row["draw"] for row in rows if row["rollout"] == number] for number in (0, 1)]
    usable = [[d for d in draws if max(scores[d]) > min(scores[d])] for draws in by_rollout]
    assert [len(x) for x in usable] == [4, 4] and max(by_rollout[0]) < min(by_rollout[1])
    share = float(trainer.callback_metrics["rollout/replaced"])
    assert share == (len(by_rollout[1]) - 4) / 4 > 0
    same = float(trainer.callback_metrics["rollout/same"])  # of all that were asked
    assert same == pytest.approx((len(by_rollout[1]) - 4) / len(by_rollout[1]))


def test_without_enough_prompts_the_rollout_is_smaller(tmp_path: Path) -> None:
    def once(samples: Sequence[Sample]) -> list[float]:
        return [float(s.row["n"] == 5 and len(s.response)) for s in samples]

    found, trainer, rows = replaced(tmp_path, reward=once, dynamic_sampling=2)
    assert len(rows) == 2 * 4 * 3 and trainer.global_step == 2
    assert [rows[draw]["row"]["n"] for draw in found.rollout_loader.batch.draw.tolist()] == [5]


def test_dynamic_sampling_that_finds_nothing_ends_with_counts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in rollout 0 the answers to each of 16 prompts all score the same"):
        replaced(tmp_path, reward=lambda samples: [1.0] * len(samples))


def test_what_waits_of_later_prompts_of_a_rollout_stays_until_their_turn(tmp_path: Path) -> None:
    """Those of the second batch that dynamic sampling has drawn are on file when the run is killed twice."""

    def answered(draws: Sequence[int]) -> list[AnsweredPrompt]:
        response = Response([1, 2], [-1.0, -2.0], True, "1 2")
        return [AnsweredPrompt(Prompt(draw, Example([]), [5]), draw, [response], [1.0]) for draw in draws]

    for _ in range(2):
        file = RolloutFile(tmp_path / "rollouts.jsonl")
        known = file.begin(0, "same", False)
        file.append(answered([0, 1]), 0, "same")
        if not known:
            file.append(answered([2, 3]), 0, "same", scored=False)
        file.end(0, {0, 1})
    assert sorted(RolloutFile(tmp_path / "rollouts.jsonl").begin(0, "same", False)) == [0, 1, 2, 3]


def test_the_price_that_is_logged_is_the_one_that_is_paid() -> None:
    """In the rewards that of before the rollout, as a term of the loss that of after it."""
    for kl in ("reward", "k3"):
        found = algorithm(GRPO, {"samples": 2, "kl": kl, "kl_coef": 0.1, "kl_target": 1e-6, "kl_horizon": 10.0})
        prices = []
        found.on_train_start = lambda kept=prices, of=found: kept.append(of.kl_controller.coefficient)
        trainer = fit(found, Questions(), max_epochs=2)
        logged = float(trainer.callback_metrics["rollout/kl_coef"])
        last = found.kl_controller.coefficient
        assert (logged == pytest.approx(last)) is (kl == "k3") and last != 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_sampling": -1}, "0 or more"),
        ({"dynamic_sampling": 1, "samples": 1, "estimator": Whitened()}, "samples 2 or more"),
        ({"kl_target": 5.0, "kl_coef": 0.0}, "give that a start, such as 0.05"),
    ],
)
def test_dynamic_sampling_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        algorithm(PolicyGradient, {"estimator": LeaveOneOut(), "samples": 2} | options)


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_price_of_kl_is_steered() -> None:
    price = KLController(0.1, target=6.0, horizon=100.0)
    price.update(12.0, 50)
    assert price.coefficient == pytest.approx(0.1 * 1.1)
    price.update(5.4, 50)
    assert price.coefficient == pytest.approx(0.11 * 0.95)
    fixed = KLController(0.1)
    fixed.update(100.0, 50)
    assert fixed.coefficient == 0.1


def test_scores_are_penalised_normalised_and_clipped_in_this_order() -> None:
    whole = Trajectory.of([Tree([1], [[2, 0], [3, 4]], [1.0, 1.0]), Tree([1], [[0], [5, 0]], [2.0, 9.0])])
    shaped, _ = ScoreTransform(eos_penalty=1.0)(whole, {0}, 8)
    assert shaped.tolist() == [1, 0, 2, 9]
    shape = ScoreTransform(eos_penalty=1.0, normalise=True, clip=1.0)
    shaped, logged = shape(whole, {0}, 8)
    scores = torch.tensor([1.0, 0, 2, 9])
    expected = (scores - 3) / scores.std(unbiased=False)
    torch.testing.assert_close(shaped, expected.clamp(-1, 1))
    assert logged["rollout/score_clipped"] == 0.25
    shape(whole, {0}, 8)  # moments go on: twice the same scores have the same mean and deviation
    assert shape.state_dict()["moments"] == pytest.approx([8, 3, 2 * float(((scores - 3) ** 2).sum())])


WRONG: list[tuple[type[OnPolicy], dict[str, Any], str]] = [
    (PPO, {"sampling": Sampling(top_k=5)}, "neither top_k nor top_p"),
    (GRPO, {"sampling": Sampling(top_p=0.9)}, "neither top_k nor top_p"),
    (PPO, {"sampling": Sampling(temperature=0.0)}, "temperature above 0"),
    (GRPO, {"samples": 1}, "give 2 or more"),
    (RejectionSampling, {"samples": 1}, "2 samples or more"),
    (OnlineDPO, {"samples": 1}, "a pair takes two answers; give 2 or more"),
    (OnlineDPO, {"sampling": Sampling(temperature=0.0)}, "temperature above 0"),
    (RejectionSampling, {"samples": 4, "top": 4}, "keep fewer"),
    (PPO, {"epochs": 0}, "give 1 or more"),
    (PPO, {"estimator": Whitened()}, "use --model PolicyGradient"),
    (PPO, {"reference": "precomputed"}, "leave it out"),
    (PPO, {"reward": None}, "--model.reward: missing; PPO learns from scores"),
    (Distillation, {"teacher": None}, "--model.teacher.path: missing"),
    (Distillation, {"given": 1.5}, "from 0 to 1"),
    (Distillation, {"given": 1.0, "samples": 2}, "leave out --model.samples"),
    (Distillation, {"divergence": SampledReverseKL(), "given": 0.5}, "leave out --model.given"),
    (Distillation, {"divergence": SampledReverseKL(), "sampling": Sampling(top_k=5)}, "leave out .*top_k"),
]


@pytest.mark.parametrize(("kind", "options", "message"), WRONG)
def test_settings_that_make_no_sense(kind: type[OnPolicy], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        algorithm(kind, options)


@pytest.mark.parametrize(
    ("options", "size", "budget", "message"),
    [
        ({"minibatches": 3}, 8, 4096, "set --data.batch_size 9"),
        ({"samples": 8}, 8, 50, "set --data.max_tokens 57 or more"),
    ],
)
def test_what_cannot_fit_is_said_before_sampling(options: Any, size: int, budget: int, message: str) -> None:
    data = Questions(size)
    data.max_tokens = budget
    with pytest.raises(UserError, match=message):
        fit(algorithm(PPO, options), data)


@pytest.mark.parametrize(("kind", "options"), [*KINDS, *SETTINGS])
def test_minibatches_that_may_be_too_long_are_cut_and_take_the_same_step(
    kind: type[OnPolicy], options: dict[str, Any]
) -> None:
    ends, sizes = [], list[int]()
    for budget in (4096, 50):
        found, data = algorithm(kind, options), Questions()
        data.max_tokens = budget
        whole = found.loss
        found.loss = lambda batch, of=whole: sizes.append(batch.size) or of(batch)  # type: ignore[method-assign]
        sizes.clear()
        fit(found, data, max_epochs=2)
        ends.append(weights_of(found.policy))
    assert max(sizes) <= 50 and found.micro_batches.token_limit == 50
    torch.testing.assert_close(ends[0], ends[1], atol=2e-5, rtol=0)


def test_rejected_answers_need_no_room_in_a_micro_batch() -> None:
    """Of 8 answers one is trained on: a prompt of at most 9 tokens with it has room where all 8 have none."""
    data = Questions()
    data.max_tokens = 9 + SHORT.max_new_tokens
    fit(algorithm(RejectionSampling, {"samples": 8}), data)


def test_other_data_is_refused() -> None:
    from small import TreeData, some_trees

    with pytest.raises(UserError, match="set --data PromptData"):
        fit(algorithm(PPO, {}), TreeData(some_trees()))


def answered(scores: list[float]) -> AnsweredPrompt:
    """A prompt whose k-th response is the token k + 1."""
    responses = [Response([k + 1], [0.0], True, str(k + 1)) for k in range(len(scores))]
    return AnsweredPrompt(Prompt(0, Example([]), [1]), 0, responses, scores)


def test_rejection_keeps_the_best_and_the_earlier_of_equals() -> None:
    found = algorithm(RejectionSampling, {"samples": 4, "top": 2, "threshold": 0.5})

    def kept(scores: list[float]) -> list[list[int]]:
        return [response.tokens for response in found.best(answered(scores)).responses]

    assert kept([0.7, 0.9, 0.9, 0.1]) == [[2], [3]] and found.best(answered([0.7, 0.9, 0.9, 0.1])).scores == [0.9, 0.9]
    assert kept([0.4, 0.6]) == [[2]] and kept([0.4, 0.1]) == []
    from leyden.algos.rejection_sampling import best_of

    assert best_of([answered([3.0, 1.0, 2.0, 0.0])]) == pytest.approx({1: 1.5, 2: (3 * 3 + 2 * 2 + 1) / 6, 4: 3.0})


@pytest.mark.parametrize("objective", [Sigmoid(0.3), IPO(0.3, per_token=True), SimPO(), ORPO()], ids=repr)
def test_online_dpo_learns_from_pairs_whose_scores_differ(objective: Objective) -> None:
    """By loops over single pairs: of three answers, of which two score the same, two pairs; of equal ones none."""
    found = algorithm(OnlineDPO, {"samples": 3, "objective": objective})
    trees = [
        Tree([5, 6], [[7, 8], [9], [10, 11]], [2.0, 1.0, 1.0]),
        Tree([7], [[8], [9, 10], [11, 12, 13]], [0.5, 0.5, 0.5]),
        Tree([8, 9], [[1, 2, 3], [4], [5, 6]], [3.0, 2.0, 1.0]),
    ]
    batch = Trajectory.of(trees)
    batch.ref_logp = torch.randn(len(batch), generator=torch.Generator().manual_seed(0)) * (batch.branch >= 0)
    logp = found.policy(batch, {"logp"}, SHORT.temperature).logp
    given = batch.per_branch(logp - batch.ref_logp if objective.needs_reference else logp)
    if objective.per_token:
        given = given / torch.tensor([2.0, 1, 2, 1, 2, 3, 3, 1, 2])
    pairs = [[(0, 1), (0, 2)], [], [(6, 7), (6, 8), (7, 8)]]
    losses = [[objective(given[[a]], given[[b]]).sum() for a, b in mine] for mine in pairs]
    expected, loss = sum((sum(mine) / len(mine) for mine in losses if mine), torch.zeros(())) / 3, found.loss(batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    parameters = list(found.policy.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    right = [float(given[a] > given[b]) for mine in (pairs[0], pairs[2]) for a, b in mine]
    accuracy = ((right[0] + right[1] + 0.5) / 3 + 0.5 + sum(right[2:]) / 3) / 3
    assert float(found._notes["accuracy"]) == pytest.approx(accuracy)


def test_a_rollout_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(every=0.0)
    fit(algorithm(PPO, {"samples": 2}), Questions(), enable_progress_bar=True, callbacks=[shown])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rollout")]
    assert lines and lines[0].startswith("rollout 1 · ") and lines[-1] == "rollout 1 · 16/16 responses"
