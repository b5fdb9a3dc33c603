"""KTO and BCO: losses by hand, the point that a step hands to the next, and that no cut of a step changes it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Ranks
from small import TreeData, fit, labelled_trees, small, weights_of
from test_dpo import Fixed, off
from test_on_policy import resume
from torch import Tensor

from leyden.algorithm import WithLabels
from leyden.algos import BCO, KTO
from leyden.batch.forest import Totals, Tree, pack
from leyden.batch.tree import BORROWED
from leyden.checkpoint.callback import RNGState
from leyden.errors import UserError

KINDS: list[type[WithLabels]] = [KTO, BCO]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, eps=1e-4)  # no sign of rounding


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Points(Callback):
    """Keeps the point that each step was taken with, and its loss and gradient."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.before = module.point

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.seen):
            self.seen.append((self.before, module.point))
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def test_answers_without_a_label_are_refused() -> None:
    trees = labelled_trees(4)
    trees[1].scores = [0.5, BORROWED]
    with pytest.raises(UserError, match="25 % of the answers are labelled neither 1, good, nor 0, bad"):
        fit(KTO(small(), optimizer=adam, lr_scheduler=None), TreeData(trees, batch_size=4), max_epochs=1)

    class Instructions(TreeData):
        kind = "instruction"

    with pytest.raises(UserError, match="set --data PreferenceData"):
        fit(BCO(small(), optimizer=adam, lr_scheduler=None), Instructions(trees, batch_size=4), max_epochs=1)


def test_data_that_lends_no_responses_is_refused() -> None:
    trees = labelled_trees(4)
    for tree in trees:
        tree.responses, tree.weights = tree.responses[:1], tree.weights and tree.weights[:1]
        tree.scores = [1.0]
    with pytest.raises(UserError, match="KTO compares with responses to other prompts, and the data gives none"):
        fit(KTO(small(), optimizer=adam, lr_scheduler=None), TreeData(trees, batch_size=4), max_epochs=1)
    fit(BCO(small(), optimizer=adam, lr_scheduler=None), TreeData(trees, batch_size=4), max_epochs=1)


# -- the losses -------------------------------------------------------------------------------------------------------


def ready(kind: type[WithLabels], trees: list[Tree], point: float, **options: Any) -> tuple[Any, Any, list[float]]:
    """An algorithm with a point, a batch, and the rewards of its responses by plain numbers."""
    batch = pack(trees)
    found = kind(small(), **options)
    ref = torch.randn(len(batch), generator=torch.Generator().manual_seed(4)) * (batch.branch >= 0) - 3
    found.reference, found._agreed, found.point = Fixed(ref * (batch.branch >= 0)), True, point
    logp = found.policy(batch).logp.detach()
    rewards = [
        found.beta * float(((logp - found.reference(batch)) * batch.weight)[start:stop].sum())
        for span in batch.structure()
        for _, start, stop in span.responses
    ]
    return found, batch, rewards


TREES = [
    Tree([1, 2], [[3, 4, 5], [6, 7]], [1.0, BORROWED]),
    Tree([7], [[8, 9], [10]], [0.0, BORROWED], [[1.0, 0.0], [1.0]]),
    Tree([4, 4, 4], [[5], [1, 2, 3]], [0.0, BORROWED]),
]


def test_ktos_loss_by_hand() -> None:
    """λ_D (1 - σ(r - z_0)) of the good one, λ_U (1 - σ(z_0 - r)) of the two bad ones, over three."""
    found, batch, r = ready(KTO, TREES, 0.3, desirable_weight=1.5, undesirable_weight=0.7)
    good, bad = 1.5 * (1 - sigmoid(r[0] - 0.3)), [0.7 * (1 - sigmoid(0.3 - r[k])) for k in (2, 4)]
    assert float(found.loss(batch).detach()) == pytest.approx((good + sum(bad)) / 3, rel=1e-6)
    assert float(found._notes["kl"]) == pytest.approx((r[1] + r[3] + r[5]) / 3 / 0.1, rel=1e-5)


def test_bcos_loss_by_hand() -> None:
    found, batch, r = ready(BCO, TREES, -0.2, beta=0.3)
    expected = -math.log(sigmoid(r[0] + 0.2)) - math.log(sigmoid(-r[2] - 0.2)) - math.log(sigmoid(-r[4] - 0.2))
    assert float(found.loss(batch).detach()) == pytest.approx(expected / 3, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_by_hand_and_none_through_what_is_borrowed(kind: type[WithLabels]) -> None:
    """Slopes of the rewards by finite differences, times the gradients of the own responses' log-probs."""
    found, batch, r = ready(kind, TREES, 0.3)
    parameters = list(found.policy.parameters())
    ours = torch.autograd.grad(found.loss(batch), parameters)
    logp = batch.per_branch(found.policy(batch).logp)[[0, 2, 4]]

    def term(reward: float, good: bool) -> float:
        x = (reward - 0.3) if good else (0.3 - reward)
        return (1 - sigmoid(x) if kind is KTO else -math.log(sigmoid(x))) / 3

    step = 1e-5
    slopes = [(term(r[k] + step, k == 0) - term(r[k] - step, k == 0)) / (2 * step) * found.beta for k in (0, 2, 4)]
    theirs = torch.autograd.grad((torch.tensor(slopes) * logp).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert off(a, b) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_noted(kind: type[WithLabels]) -> None:
    found, batch, r = ready(kind, TREES, 0.0)
    found.loss(batch)
    metrics = found.step_metrics({name: float(value) for name, value in found._notes.items()})
    assert metrics["chosen_reward"] == pytest.approx(r[0], rel=1e-5)
    assert metrics["rejected_reward"] == pytest.approx((r[2] + r[4]) / 2, rel=1e-5)
    assert metrics["margin"] == pytest.approx(r[0] - (r[2] + r[4]) / 2, rel=1e-5)
    assert metrics["good_share"] == pytest.approx(1 / 3)
    assert metrics["accuracy"] == pytest.approx(((r[0] > 0) + (r[2] < 0) + (r[4] < 0)) / 3)
    assert ("kl" in metrics) is (kind is KTO)
    found.reference, found._notes = Fixed(found.policy(batch).logp.detach()), {}
    found.loss(batch)
    assert float(found._notes["accuracy"]) == pytest.approx(0.5), "at the point itself neither is right"
    sums = {"good": 0.0, "bad": 1.0, "good_reward": 0.0, "bad_reward": -2.0, "borrowed": 1.0}
    alone = found.step_metrics(sums)
    assert alone == {"rejected_reward": -2.0, "good_share": 0.0}


def test_what_is_borrowed_counts_in_no_totals() -> None:
    assert pack(TREES).totals == Totals(5.0, 3, 3)
    assert sum((tree.totals() for tree in TREES), Totals(0.0, 0, 0)) == Totals(5.0, 3, 3)


# -- the point --------------------------------------------------------------------------------------------------------


def test_the_kl_point_is_that_of_the_step_before_and_at_least_0() -> None:
    found = KTO(small(), beta=0.2)
    assert found.point == 0.0
    found.on_step_metrics({"kl": 3.0})
    assert found.point == pytest.approx(0.6)
    found.on_step_metrics({"kl": -3.0})
    assert found.point == 0.0


def test_bcos_shift_is_half_of_both_means_over_the_steps_so_far() -> None:
    found = BCO(small())
    found.on_step_metrics({"good_share": 0.25, "chosen_reward": 2.0, "rejected_reward": -1.0})
    assert found.point == pytest.approx(0.5)
    found.on_step_metrics({"good_share": 0.75, "chosen_reward": 6.0, "rejected_reward": 3.0})
    assert found.point == pytest.approx(((0.25 * 2 + 0.75 * 6) + (0.75 * -1 + 0.25 * 3)) / 2)
    found.on_step_metrics({"good_share": 1.0, "chosen_reward": 5.0})  # and no bad one
    assert found.point == pytest.approx(((5.0 + 5.0) / 2 + 0.0) / 2)


def run(kind: type[WithLabels], accumulate: int = 1, devices: int = 1, epochs: int = 3) -> tuple[Tensor, Points]:
    points = Points()
    found = kind(small(), optimizer=adam, lr_scheduler=None)
    fit(
        found,
        TreeData(labelled_trees(8), labelled_trees(3), batch_size=4),
        callbacks=[points],
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
    )
    return weights_of(found.policy), points


def on_one_rank(kind: str, accumulate: int) -> tuple[Tensor, list[float], list[float]]:
    weights, points = run({"KTO": KTO, "BCO": BCO}[kind], accumulate, 2)
    return weights, [after for _, after in points.seen], points.losses


@pytest.mark.parametrize("kind", KINDS)
def test_no_cut_of_a_step_changes_points_or_weights(kind: type[WithLabels], ranks: Ranks) -> None:
    whole, points = run(kind)
    after = [point for _, point in points.seen]
    assert points.seen[0][0] == 0.0 and len(after) == 6
    assert abs(after[0]) < 1e-6, "in the first step policy and reference agree"
    assert max(map(abs, after)) > 1e-2, "later they do not"
    assert [before for before, _ in points.seen][1:] == after[:-1], "a step has the point that the one before set"
    start = {KTO: 0.5, BCO: math.log(2)}[kind]
    assert points.losses[0] == pytest.approx(start, abs=1e-6)
    for accumulate in (2, 4):
        found, cut = run(kind, accumulate)
        torch.testing.assert_close(found, whole, atol=2e-5, rtol=0)
        assert [point for _, point in cut.seen] == pytest.approx(after, abs=1e-5)
    for found, also, losses in ranks(on_one_rank, kind.__name__, 2):
        torch.testing.assert_close(found, whole, atol=2e-5, rtol=0)
        assert also == pytest.approx(after, abs=1e-5) and losses[0] == pytest.approx(start, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_precomputed_trains_like_a_copy(kind: type[WithLabels]) -> None:
    ends = []
    for reference in ("copy", "precomputed"):
        found = kind(small(), optimizer=adam, lr_scheduler=None, reference=reference)
        fit(found, TreeData(labelled_trees(8), labelled_trees(3), batch_size=4), max_epochs=2)
        ends.append(weights_of(found.policy))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_never_stopped(kind: type[WithLabels], tmp_path: Path) -> None:
    data = lambda: TreeData(labelled_trees(8), labelled_trees(3), batch_size=4)  # noqa: E731
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    whole = kind(small(), optimizer=adam, lr_scheduler=None)
    fit(whole, data(), max_epochs=3, callbacks=[saver, RNGState()], enable_checkpointing=True)
    for step in (1, 3, 4):
        found = kind(small(), optimizer=adam, lr_scheduler=None)
        resume(found, data(), tmp_path / f"{step}.ckpt", max_epochs=3, callbacks=[RNGState()])
        assert torch.equal(weights_of(found.policy), weights_of(whole.policy)), step
        assert found.point == whole.point and abs(whole.point) > 1e-3
        assert not isinstance(found, BCO) or found.seen == whole.seen


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_which_is_good(kind: type[WithLabels]) -> None:
    found = kind(small(), optimizer=lambda p: torch.optim.Adam(p, lr=3e-3), lr_scheduler=None, beta=0.3)
    data = TreeData(labelled_trees(9), labelled_trees(9), batch_size=9)
    metrics = fit(found, data, max_epochs=40).callback_metrics
    assert float(metrics["val/accuracy"]) == 1.0 and float(metrics["val/margin"]) > 1.0
    assert float(metrics["val/chosen_reward"]) > found.point > float(metrics["val/rejected_reward"])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (KTO, {"beta": 0.0}, "--model.beta 0.0: give more than 0"),
        (BCO, {"beta": -1.0}, "--model.beta -1.0: give more than 0"),
        (KTO, {"desirable_weight": 0.0}, "give more than 0 of both"),
        (KTO, {"undesirable_weight": -1.0}, "give more than 0 of both"),
    ],
)
def test_settings_that_make_no_sense(kind: type[WithLabels], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(small(), **options)
