"""Corrections of samples of another engine: by hand, against a loop, in expectation, and in runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import enumerable
import pytest
import test_policy_gradient as exact
import torch
from enumerable import LENGTH, START, WORDS, Table
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Ranks
from small import fit, weights_of
from test_on_policy import Questions, algorithm, resume
from torch import Tensor

from leyden.algos import GRPO, PPO
from leyden.batch import Trajectory, Tree
from leyden.checkpoint.callback import RNGState
from leyden.corrections import MIS, TIS, Correction, IcePop, NoCorrection
from leyden.errors import UserError
from leyden.losses import kl_estimate
from leyden.on_policy import Rollout
from leyden.policy import Engine, Native

STEPS: dict[str, Any] = {"samples": 3, "epochs": 2, "minibatches": 2}
SHIPPED: list[Correction] = [TIS(), TIS(level="sequence"), MIS(), MIS(level="token"), IcePop()]


def one_response(ratios: list[float]) -> tuple[Trajectory, Tensor]:
    """A prompt of two tokens and a response whose tokens have these weights, π_old / μ."""
    batch = Trajectory.of([Tree([1, 2], [[3] * len(ratios)], [0.0])])
    log_ratio = torch.zeros(len(batch))
    log_ratio[2:] = torch.tensor(ratios).log()
    return batch, log_ratio


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correction", "weights", "corrected"),
    [
        (TIS(), [0.25, 0.5, 1, 1.5, 2, 2], [0, 0, 0, 0, 1, 1]),
        (TIS(cap=4), [0.25, 0.5, 1, 1.5, 3, 4], [0, 0, 0, 0, 0, 1]),
        (TIS(level="sequence"), [2] * 6, [1] * 6),  # 1/4 · 1/2 · 1 · 3/2 · 3 · 8 = 9/2
        (TIS(cap=6, level="sequence"), [4.5] * 6, [0] * 6),
        (MIS(), [0] * 6, [1] * 6),
        (MIS(cap=6), [4.5] * 6, [0] * 6),
        (MIS(level="token"), [0.25, 0.5, 1, 1.5, 0, 0], [0, 0, 0, 0, 1, 1]),
        (IcePop(), [0, 0.5, 1, 1.5, 3, 0], [1, 0, 0, 0, 0, 1]),
        (IcePop(low=0.0, high=2.0), [0.25, 0.5, 1, 1.5, 0, 0], [0, 0, 0, 0, 1, 1]),
        (NoCorrection(), [1] * 6, [0] * 6),
    ],
)
def test_by_hand(correction: Correction, weights: list[float], corrected: list[int]) -> None:
    batch, log_ratio = one_response([0.25, 0.5, 1.0, 1.5, 3.0, 8.0])
    found = correction(batch, log_ratio)
    torch.testing.assert_close(found[2:], torch.tensor(weights).float(), atol=1e-5, rtol=0)
    assert found[:2].tolist() == [1, 1], "a prompt has nothing to correct"
    assert correction.corrected(batch, log_ratio).tolist() == [False] * 2 + [bool(x) for x in corrected]


def by_loop(correction: Any, ratios: list[float]) -> list[float]:
    """The weights of one response, number by number in double precision."""
    sequence = getattr(correction, "level", "token") == "sequence"
    weights = [math.exp(min(math.fsum(ratios), 80)) for _ in ratios] if sequence else [math.exp(r) for r in ratios]
    if isinstance(correction, TIS):
        return [min(w, correction.cap) for w in weights]
    low, high = (correction.low, correction.high) if isinstance(correction, IcePop) else (0.0, correction.cap)
    return [w if low <= w <= high else 0.0 for w in weights]


RESPONSES = st.lists(st.lists(st.lists(st.integers(-37, 37), min_size=1, max_size=5), max_size=3), max_size=4)


@settings(deadline=None, max_examples=60)
@given(RESPONSES, st.sampled_from(SHIPPED))
def test_a_packed_batch_has_the_weights_of_each_response_alone(trees: list[Any], correction: Any) -> None:
    """And each part of it: what else is packed beside a response changes no bit of its weights."""
    batch = Trajectory.of([Tree([1, 2], [[3] * len(r) for r in tree], [0.0] * len(tree)) for tree in trees])
    nats = [0.1 * x + 0.013 for tree in trees for response in tree for x in response]  # no weight is just a bound
    log_ratio = torch.zeros(len(batch))
    log_ratio[batch.branch >= 0] = torch.tensor(nats)
    found = correction(batch, log_ratio)
    loop = [w for t in trees for r in t for w in by_loop(correction, [0.1 * x + 0.013 for x in r])]
    torch.testing.assert_close(found[batch.branch >= 0], torch.tensor(loop), atol=1e-5, rtol=1e-4)
    assert (found[batch.branch < 0] == 1).all()
    for number, span in enumerate(batch.structure()):
        alone = correction(batch.select([number]), log_ratio[span.start : span.stop])
        assert torch.equal(alone, found[span.start : span.stop])


@pytest.mark.parametrize("correction", SHIPPED)
def test_samples_of_the_policy_itself_have_a_weight_of_exactly_one(correction: Correction) -> None:
    batch, log_ratio = one_response([1.0] * 999)
    assert (correction(batch, log_ratio) == 1).all() and not correction.corrected(batch, log_ratio).any()


@pytest.mark.parametrize("correction", [*SHIPPED, TIS(cap=math.inf), TIS(cap=math.inf, level="sequence")])
def test_nothing_overflows_and_no_gradient_passes(correction: Correction) -> None:
    """Whatever the engine says, also that it never says what it said: log μ = -inf."""
    batch, _ = one_response([1.0] * 200)
    for nats in (1e4, 50.0, -50.0, -1e4, math.inf):
        log_ratio = torch.zeros(len(batch))
        log_ratio[2:] = nats
        found = correction(batch, log_ratio.requires_grad_())
        assert found.isfinite().all() and (found >= 0).all() and not found.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TIS(cap=0.5), "cap 0.5: it must be 1 or more"),
        (lambda: TIS(cap=math.nan), "cap nan: it must be"),
        (lambda: MIS(cap=-1), "cap -1: it must be 1 or more"),
        (lambda: MIS(level="word"), "level word: use token or sequence"),  # type: ignore[arg-type]
        (lambda: IcePop(low=1.5), "low 1.5 high 5.0: 0 <= low <= 1 <= high is needed"),
        (lambda: IcePop(high=0.9), "low 0.5 high 0.9: 0 <= low <= 1 <= high is needed"),
        (lambda: IcePop(low=-0.1), "low -0.1 high 5.0"),
    ],
)
def test_bounds_that_make_no_sense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# -- in expectation --------------------------------------------------------------------------------------------------


def expected_gradient(length: int, correction: Correction) -> tuple[Tensor, Tensor]:
    """Of a policy whose every answer of so many words is listed: the mean over the samples of another distribution μ,
    each answer weighed by μ, and the gradient of -E[r] under the policy itself."""
    policy, engine = Table(3), Table(4, spread=0.5)
    words = torch.cartesian_prod(*[torch.arange(WORDS)] * length).reshape(-1, length).tolist()
    reward = enumerable.rewards(3)[: len(words)]
    batch = Trajectory.of([Tree([START], words, reward.tolist())])
    batch.old_logp, batch.sampled_logp = policy(batch).logp.detach(), engine(batch).logp.detach()
    batch.weight = batch.per_token(batch.per_branch(batch.sampled_logp).exp())
    found = exact.algorithm(GRPO, 3, kl_coef=0.0, correction=correction)
    batch = found.credit(Rollout(0, [], batch))
    batch.advantage = batch.per_token(reward - 0.3)  # any baseline that does not depend on the answer
    (slope,) = torch.autograd.grad(found.policy_loss(batch, policy(batch)) * batch.totals.tokens, policy.logits)
    p = enumerable.log_probs(policy, replace(batch, weight=(batch.branch >= 0).float())).exp()
    (truth,) = torch.autograd.grad(-(p * reward).sum(), policy.logits)
    return slope, truth


def error(length: int, correction: Correction) -> float:
    slope, truth = expected_gradient(length, correction)
    return float((slope - truth).norm() / truth.norm())


def test_corrected_samples_of_another_distribution_have_the_gradient_of_the_policy() -> None:
    """E_μ[w A ∇log π] = E_π[A ∇log π] for answers of one word; masking and truncation leave a part out."""
    assert error(1, TIS(cap=1e6)) < 1e-5 and error(1, MIS(cap=1e6)) < 1e-5
    assert error(1, NoCorrection()) > 0.2
    assert 1e-3 < error(1, TIS(cap=2.0)) < error(1, NoCorrection())


def test_only_weights_of_sequences_are_exact_for_longer_answers() -> None:
    """A token's own weight does not say how often what stands before it, and after it, is sampled."""
    assert error(LENGTH, TIS(cap=1e9, level="sequence")) < 1e-4 and error(LENGTH, MIS(cap=1e9)) < 1e-4
    assert error(LENGTH, TIS(cap=1e9)) > 0.2


def test_mismatch_k3_is_the_divergence_of_the_engine_from_the_policy() -> None:
    """Σ μ (exp(-d) - 1 + d) = Σ μ log μ / π, over everything that can be said; not the other way round."""
    engine, policy = (table.logits[0].log_softmax(0).double() for table in (Table(1), Table(2)))
    mean = (engine.exp() * kl_estimate(engine - policy, "k3")).sum()
    torch.testing.assert_close(mean, (engine.exp() * (engine - policy)).sum())
    assert abs(mean - (policy.exp() * (policy - engine)).sum()) > 0.01


# -- in runs ---------------------------------------------------------------------------------------------------------


class Noisy(Native):
    """The policy's own samples with log-probs that are off, by the same for the same tokens, or by a constant."""

    def __init__(self, nats: float | None = None) -> None:
        super().__init__()
        self.nats = nats

    def is_exact(self, policy: Any) -> bool:
        return False

    def generate(self, *args: Any) -> Any:
        def off(token: int, place: int) -> float:
            return 1.2 * math.sin(13.0 * token + place) if self.nats is None else self.nats

        def account(r: Any) -> list[float]:
            return [lp - off(t, i) for i, (t, lp) in enumerate(zip(r.tokens, r.logp, strict=True))]

        return [[replace(r, logp=account(r)) for r in group] for group in super().generate(*args)]


def trained(engine: Engine | None, correction: Correction | None, rate: float = 0.1, **options: Any) -> Any:
    """(weights, metrics) of one step on one rollout by plain gradient descent."""
    found = algorithm(GRPO, {"samples": 3}, engine=engine, correction=correction, **options)
    found.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=rate)
    trainer = fit(found, Questions())
    return weights_of(found.policy), {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_losses_are_multiplied_by_the_weights() -> None:
    """Weights of 3, cut at 2, are twice the learning rate, bit for bit; masked ones no step at all."""
    plain, logged = trained(None, None)
    assert "rollout/correction" not in logged and "rollout/corrected" not in logged
    off, logged = trained(Noisy(math.log(3)), NoCorrection())
    assert torch.equal(off, plain) and "rollout/correction" not in logged
    assert logged["rollout/mismatch"] == pytest.approx(math.log(3), abs=1e-5)
    assert logged["rollout/mismatch_max"] == pytest.approx(math.log(3), abs=1e-5)
    assert logged["rollout/mismatch_k3"] == pytest.approx(3 - 1 - math.log(3), abs=1e-4)
    doubled, logged = trained(Noisy(math.log(3)), None)
    assert torch.equal(doubled, trained(None, None, rate=0.2)[0]) and not torch.equal(doubled, plain)
    assert logged["rollout/correction"] == 2 and logged["rollout/corrected"] == 1
    still, logged = trained(Noisy(math.log(3)), IcePop(high=2.0))
    assert logged["rollout/correction"] == 0 and logged["rollout/corrected"] == 1
    assert not torch.equal(still, plain) and torch.equal(still, weights_of(algorithm(GRPO, {"samples": 3}).policy))


def on_rank(folder: str) -> tuple[Tensor, dict[str, float]]:
    from lightning.pytorch.strategies import DDPStrategy

    found = algorithm(GRPO, STEPS, engine=Noisy(), correction=TIS(cap=1.5))
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = fit(found, Questions(), max_epochs=2, devices=2, strategy=strategy, default_root_dir=folder)
    return weights_of(found.policy), rollout_numbers(trainer)


def rollout_numbers(trainer: Any) -> dict[str, float]:
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("rollout/corr", "rollout/mism"))}


def test_two_processes_correct_as_one_does(ranks: Ranks, tmp_path: Path) -> None:
    one = algorithm(GRPO, STEPS, engine=Noisy(), correction=TIS(cap=1.5))
    trainer = fit(one, Questions(), max_epochs=2)
    first, second = ranks(on_rank, str(tmp_path))
    torch.testing.assert_close(first[0], second[0], atol=0, rtol=0)
    torch.testing.assert_close(first[0], weights_of(one.policy), atol=2e-5, rtol=0)
    alone = rollout_numbers(trainer)
    assert first[1] == second[1] and len(alone) == 5 and 0 < alone["rollout/corrected"] < 1
    assert alone["rollout/mismatch_max"] > 2 * alone["rollout/mismatch"] / 1.5 > 0
    for name, value in alone.items():
        assert first[1][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("correction", [TIS(level="sequence"), IcePop()])
def test_accumulation_changes_nothing(correction: Correction) -> None:
    ends = []
    for accumulate in (1, 2):
        found = algorithm(GRPO, STEPS, engine=Noisy(), correction=correction)
        fit(found, Questions(), max_epochs=2, accumulate_grad_batches=accumulate)
        ends.append(weights_of(found.policy))
    torch.testing.assert_close(ends[0], ends[1], atol=2e-5, rtol=0)


def test_resumed_in_the_middle_of_a_corrected_rollout_is_never_stopped(tmp_path: Path) -> None:
    whole = algorithm(GRPO, STEPS, engine=Noisy())
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    fit(whole, Questions(), max_epochs=2, callbacks=[saver, RNGState()], enable_checkpointing=True)
    assert not torch.equal(weights_of(whole.policy), uncorrected())
    for step in (1, 3, 6):
        found = algorithm(GRPO, STEPS, engine=Noisy())
        resume(found, Questions(), tmp_path / f"{step}.ckpt", max_epochs=2, callbacks=[RNGState()])
        assert torch.equal(weights_of(found.policy), weights_of(whole.policy)), step


def uncorrected() -> Tensor:
    found = algorithm(GRPO, STEPS, engine=Noisy(), correction=NoCorrection())
    fit(found, Questions(), max_epochs=2)
    return weights_of(found.policy)


def test_a_rollout_from_before_there_were_corrections_still_loads() -> None:
    batch = Trajectory.of([Tree([1], [[2, 3]], [1.0])])
    state = batch.state_dict()
    assert Trajectory.from_state_dict(state | {"correction": torch.full((3,), 0.5)}).correction.tolist() == [0.5] * 3
    del state["correction"]
    assert Trajectory.from_state_dict(state).correction.tolist() == [1.0] * 3


def test_the_engine_says_whether_there_is_something_to_correct() -> None:
    class Other(Noisy):
        is_exact = Engine.is_exact  # what an engine that says nothing of it has

    assert algorithm(PPO, {}).active_correction == NoCorrection()
    assert algorithm(PPO, {}, engine=Other()).active_correction == TIS()
    assert algorithm(PPO, {}, engine=Other(), correction=MIS()).active_correction == MIS()
    message = "--model.correction TIS: the engine Native samples from the distribution that is trained"
    with pytest.raises(UserError, match=re.escape(message)):
        fit(algorithm(GRPO, STEPS, correction=TIS()), Questions())
    fit(algorithm(GRPO, STEPS, correction=NoCorrection()), Questions(), max_epochs=1)  # true of it
