"""Preference losses against values worked out by hand, their gradients, and which pairs there are."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from leyden.batch import pairwise_wins, preference_pairs
from leyden.batch.forest import Totals, Tree, pack
from leyden.losses import bradley_terry, plackett_luce
from leyden.objectives import (
    CPO,
    EXO,
    IPO,
    NCA,
    ORPO,
    APODown,
    APOZero,
    Hinge,
    Objective,
    Robust,
    Sigmoid,
    SimPO,
    log_odds,
)

# log-probs -10 and -14 under the policy, -12 and -13 under the reference: log-ratios 2 and -1
GOLDEN: list[tuple[Objective, float, float, float]] = [  # the loss, and its slopes in both
    (Sigmoid(0.1), 0.554355, -0.0425557, 0.0425557),
    (Sigmoid(0.1, label_smoothing=0.1), 0.584355, -0.0325557, 0.0325557),
    (Robust(0.1, label_smoothing=0.1), 0.516855, -0.0550557, 0.0550557),
    (Hinge(0.1), 0.7, -0.1, 0.1),
    (IPO(0.1), 4.0, -4.0, 4.0),
    (APOZero(0.1), 0.9251868, -0.0247517, 0.0249376),
    (APODown(0.1), 0.9753915, 0.0003058, 0.0244458),
    (NCA(0.1), 1.3194066, -0.0175249, 0.0237510),
    (EXO(0.1), 2.2581992, -0.1615076, 0.1615076),
    (EXO(0.1, label_smoothing=0.1), 0.3583834, -0.0463792, 0.0463792),
]
# by log-probs alone: sums of -10 and -14, or averages of -0.5 and -1.5 (ORPO: -0.5 and -1.2)
WITHOUT_REFERENCE: list[tuple[Objective, float, float, float, float, float]] = [
    (CPO(0.1), -10.0, -14.0, 0.5130153, -0.0401312, 0.0401312),
    (SimPO(2.0, 1.0), -0.5, -1.5, 0.3132617, -0.5378828, 0.5378828),
    (ORPO(0.1), -0.5, -1.2, 0.5246553, -1.0555342, 0.0312691),
]
ALL = [
    Sigmoid(),
    Sigmoid(label_smoothing=0.1),
    Robust(),
    Hinge(),
    IPO(),
    APOZero(),
    APODown(),
    NCA(),
    EXO(),
    SimPO(),
    CPO(),
]


def name(value: object) -> str:
    return repr(value)


def check(objective: Objective, w: float, l: float, loss: float, up: float, down: float) -> None:  # noqa: E741
    better, worse = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (w, l))
    found = objective(better, worse)
    assert found.shape == (1,)
    assert float(found.detach()) == pytest.approx(loss, abs=1e-6)
    found.sum().backward()
    assert better.grad is not None and worse.grad is not None
    assert float(better.grad) == pytest.approx(up, abs=1e-7)
    assert float(worse.grad) == pytest.approx(down, abs=1e-7)


@pytest.mark.parametrize(("objective", "loss", "up", "down"), GOLDEN, ids=name)
def test_golden_values(objective: Objective, loss: float, up: float, down: float) -> None:
    assert objective.needs_reference
    check(objective, -10.0 + 12.0, -14.0 + 13.0, loss, up, down)


@pytest.mark.parametrize(("objective", "better", "worse", "loss", "up", "down"), WITHOUT_REFERENCE, ids=name)
def test_golden_values_without_a_reference(
    objective: Objective, better: float, worse: float, loss: float, up: float, down: float
) -> None:
    assert not objective.needs_reference and objective.per_token is not isinstance(objective, CPO)
    check(objective, better, worse, loss, up, down)


def test_only_what_is_a_setting_is_a_setting() -> None:
    """`needs_reference` belongs to the loss: nobody sets it."""
    for made in (lambda: SimPO(needs_reference=True), lambda: ORPO(per_token=False)):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="unexpected keyword"):
            made()


@pytest.mark.parametrize(
    ("objective", "start"),
    [
        (Sigmoid(0.3), math.log(2)),
        (Sigmoid(0.3, 0.2), math.log(2)),
        (Hinge(), 1.0),
        (APOZero(0.3), 1.0),
        (APODown(0.3), 1.0),
        (NCA(0.3), 2 * math.log(2)),
        (EXO(0.3, 0.2), -math.log(2) - math.log(0.2 * 0.8) / 2),
    ],
    ids=name,
)
def test_where_a_new_policy_starts(objective: Objective, start: float) -> None:
    assert objective(torch.zeros(3), torch.zeros(3)).tolist() == pytest.approx([start] * 3)


@pytest.mark.parametrize("objective", [*ALL, ORPO()], ids=name)
def test_gradients_are_those_of_finite_differences(objective: Objective) -> None:
    values = torch.randn(2, 5, dtype=torch.float64) * 4
    values = (-values.abs() - 0.01 if isinstance(objective, ORPO) else values).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective(x[0], x[1]), values)


def test_log_odds_from_certain_to_impossible() -> None:
    """ln(p / (1 - p)): 0 at a half, 1e-10 and 1 - 1e-10 are ln 1e10 apart from it, and nothing is infinite."""
    x = torch.tensor([math.log(0.5), math.log(1e-10), math.log1p(-1e-10), -1e-9, -800.0], dtype=torch.float64)
    assert log_odds(x).tolist() == pytest.approx([0.0, -23.025851, 23.025851, 20.723266, -800.0], rel=1e-6)
    edge = torch.tensor([0.0, -1e-12, -1e-3, -800.0], requires_grad=True)
    for objective in (ORPO(), ORPO(2.0)):
        loss = objective(edge, edge.flip(0))
        (slope,) = torch.autograd.grad(loss.sum(), edge)
        assert torch.isfinite(loss).all() and torch.isfinite(slope).all()
    exact = (edge.double() - torch.log(-torch.expm1(edge.double())))[2]
    assert float(log_odds(edge.detach())[2]) == pytest.approx(float(exact.detach()), rel=1e-6)


def test_the_noise_that_exo_believes_in_is_where_it_ends() -> None:
    """The reverse KL is 0 where σ(β d) = 1 - ε, and nowhere else."""
    d = torch.linspace(-20, 40, 601)
    loss = EXO(0.2, 0.1)(d, torch.zeros_like(d))
    assert float(d[loss.argmin()]) == pytest.approx(math.log(0.9 / 0.1) / 0.2, abs=0.1)
    assert float(loss.min()) == pytest.approx(0.0, abs=1e-4) and (loss >= -1e-6).all()


@pytest.mark.parametrize("difference", [200.0, -200.0, 2000.0, -2000.0])
def test_nothing_overflows(difference: float) -> None:
    d = torch.tensor([difference], requires_grad=True)
    for loss in (Sigmoid(1.0)(d, torch.zeros(1)), Sigmoid(1.0, 0.1)(d, torch.zeros(1)), bradley_terry(d)):
        assert torch.isfinite(loss).all()
        (slope,) = torch.autograd.grad(loss.sum(), d)
        assert torch.isfinite(slope).all()
    assert float(bradley_terry(d.detach())) == pytest.approx(max(-difference, 0.0))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Sigmoid(0.0),
        lambda: Sigmoid(0.1, 0.5),
        lambda: Robust(0.1, -0.1),
        lambda: Hinge(-1),
        lambda: IPO(0),
        lambda: APOZero(0),
        lambda: APODown(-1),
        lambda: NCA(0),
        lambda: EXO(0.1, 0.0),
        lambda: SimPO(0),
        lambda: SimPO(2.0, -0.1),
        lambda: CPO(0),
        lambda: ORPO(0),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="beta > 0"):
        wrong()  # type: ignore[operator]


def test_unbiased_under_noise() -> None:
    """The robust loss's mean over flipped labels is the loss without noise (Chowdhury et al., lemma 3.1)."""
    better, worse, e = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64), 0.2
    robust = Robust(0.5, e)
    expected = (1 - e) * robust(better, worse) + e * robust(worse, better)
    assert torch.allclose(expected, Sigmoid(0.5)(better, worse))


def test_bradley_terry_by_hand() -> None:
    values = bradley_terry(torch.tensor([0.0, 1.0]))
    assert values.tolist() == pytest.approx([0.693147, 0.313262], abs=1e-6)
    assert float(bradley_terry(torch.tensor([1.3]), torch.tensor([0.3]))) == pytest.approx(0.313262, abs=1e-6)


def chance(order: tuple[int, ...], r: list[float]) -> float:
    """Plackett-Luce by its story: draw the best, then the next among the rest."""
    left, p = list(order), 1.0
    while left:
        p *= math.exp(r[left[0]]) / sum(math.exp(r[i]) for i in left)
        left.pop(0)
    return p


def test_plackett_luce_is_a_distribution_over_rankings() -> None:
    r = [0.3, -1.2, 2.0, 0.1]
    orders = list(permutations(range(4)))
    scores = torch.tensor([[r[i] for i in order] for order in orders], dtype=torch.float64)
    losses = plackett_luce(scores, torch.ones_like(scores, dtype=torch.bool))
    assert losses.tolist() == pytest.approx([-math.log(chance(order, r)) for order in orders])
    assert float((-losses).exp().sum()) == pytest.approx(1.0)


def test_plackett_luce_ignores_padding_values_and_gradients() -> None:
    scores = torch.tensor([[1.0, 0.2, -0.5], [0.7, 0.1, 99.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    losses = plackett_luce(scores, mask)
    assert float(losses[1].detach()) == pytest.approx(float(bradley_terry(torch.tensor([0.6]))))
    losses.sum().backward()
    assert scores.grad is not None and float(scores.grad[1, 2]) == 0.0 and torch.isfinite(scores.grad).all()
    assert float(scores.grad[0].sum()) == pytest.approx(
        0.0, abs=1e-6
    )  # a constant added to all rewards changes nothing


def brute(x: Tensor, sizes: list[int]) -> float:
    """The mean over prompts of the mean over their pairs, as loops."""
    at, means = 0, []
    for size in sizes:
        mine = [float(v) for v in x[at : at + size]]
        found = [a - b for i, a in enumerate(mine) for b in mine[i + 1 :]]
        means.append(sum(found) / len(found) if found else 0.0)
        at += size
    return sum(means) / len(means)


def test_every_pair_of_a_ranking_and_equal_weight_for_prompts() -> None:
    sizes = [2, 4, 1, 3]
    batch = pack([Tree([1, 2], [[3 + i] for i in range(size)], row=row) for row, size in enumerate(sizes)])
    found = preference_pairs(batch)
    assert len(found.better) == 1 + 6 + 0 + 3
    assert (batch.group[found.better] == batch.group[found.worse]).all() and (found.better < found.worse).all()
    x = torch.randn(sum(sizes))
    assert float(found.mean(batch, x[found.better] - x[found.worse])) == pytest.approx(brute(x, sizes), abs=1e-6)


def test_pairs_divide_by_the_prompts_of_the_whole_step() -> None:
    batch = pack([Tree([1], [[2], [3]])], Totals(100.0, 20, 10))
    assert float(preference_pairs(batch).mean(batch, torch.tensor([5.0]))) == 0.5
    assert float(preference_pairs(pack([Tree([1, 2], [])])).mean(batch, torch.zeros(0))) == 0.0


def test_a_tie_is_half_won() -> None:
    assert pairwise_wins(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])).tolist() == [1.0, 0.5, 0.0]
