"""Advantages, clips and KL estimators against numbers worked out by hand, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leyden.advantages import GroupRelative, gae, group_relative, leave_one_out, whiten
from leyden.batch import Trajectory, Tree
from leyden.losses import clipped_value, kl_estimate
from leyden.surrogates import clipped_surrogate

REWARD, VALUE = torch.tensor([[-0.1, -0.05, 1.0]]), torch.tensor([[0.2, 0.4, 0.5]])
GOLDEN = [
    (1.0, 0.95, [0.59875, 0.525, 0.5], [0.79875, 0.925, 1.0]),
    (1.0, 1.0, [0.65, 0.55, 0.5], [0.85, 0.95, 1.0]),
    (1.0, 0.0, [0.1, 0.05, 0.5], [0.3, 0.45, 1.0]),
    (0.99, 0.95, [0.580593, 0.51525, 0.5], [0.780593, 0.91525, 1.0]),
]


@pytest.mark.parametrize(("discount", "trace", "advantage", "returns"), GOLDEN)
def test_gae_by_hand(discount: float, trace: float, advantage: list[float], returns: list[float]) -> None:
    found = gae(REWARD, VALUE, torch.ones(1, 3, dtype=torch.bool), discount, trace)
    torch.testing.assert_close(found[0], torch.tensor([advantage]), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1], torch.tensor([returns]), atol=1e-6, rtol=0)


def test_padding_is_never_looked_at() -> None:
    """Whatever stands on padding, infinite or not a number, a short response has what it has by itself."""
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    poison = torch.full((3, 3), torch.nan)
    reward, value = torch.where(mask, REWARD, poison), torch.where(mask, VALUE, poison)
    advantage, returns = gae(reward, value, mask, 0.9, 0.8)
    for row, length in enumerate((3, 1, 2)):
        alone = gae(REWARD[:, :length], VALUE[:, :length], torch.ones(1, length, dtype=torch.bool), 0.9, 0.8)
        torch.testing.assert_close(advantage[row, :length], alone[0][0])
        torch.testing.assert_close(returns[row, :length], alone[1][0])
    assert (advantage[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_the_last_token_gets_the_whole_score() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    reward = torch.tensor([[0.0, 0.0, 0.0, 3.0]])
    advantage, _ = gae(reward, torch.zeros(1, 4), mask, 1.0, 0.95)
    assert advantage[0, -1] == 3.0 and advantage[0, 0] == pytest.approx(3 * 0.95**3)


def test_gae_equals_its_definition() -> None:
    """A_t = sum_k (g l)^k d_(t+k), written out in double precision."""
    generator = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = [7, 1, 4, 6, 2]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    advantage, returns = gae(reward, value, mask, 0.97, 0.9)
    for row, length in enumerate(lengths):
        after = [*value[row, 1:length].tolist(), 0.0]
        delta = [float(reward[row, t]) + 0.97 * after[t] - float(value[row, t]) for t in range(length)]
        for t in range(length):
            expected = sum((0.97 * 0.9) ** k * delta[t + k] for k in range(length - t))
            assert float(advantage[row, t]) == pytest.approx(expected, abs=1e-12)
            assert float(returns[row, t]) == pytest.approx(expected + float(value[row, t]), abs=1e-12)


def test_whitening_has_mean_zero_and_looks_at_nothing_else() -> None:
    x = torch.tensor([0.59875, 0.525, 0.5, 100.0, torch.inf])
    found = whiten(torch.where(torch.tensor([True, True, True, True, False]), x, 0.0), torch.tensor([1.0, 1, 1, 0, 0]))
    assert found[:3].mean().abs() < 1e-6 and (found[3:] == 0).all()
    assert float(found[:3].var(unbiased=False)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"), [(1.5, 1, -1.2), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0.8)]
)
def test_clip_by_hand(ratio: float, advantage: float, loss: float) -> None:
    """The gradient ends exactly where moving on would only help."""
    p = torch.tensor([ratio], requires_grad=True)
    found = clipped_surrogate(p, torch.tensor([float(advantage)]), 0.2)
    assert found.item() == pytest.approx(loss)
    clipped = loss in (-1.2, 0.8)
    assert torch.autograd.grad(found, p)[0].item() == (0 if clipped else -advantage)


def test_value_loss_by_hand() -> None:
    one = torch.ones(1)
    assert clipped_value(one, one / 2, 2 * one, 0.2).item() == pytest.approx(0.845)
    assert clipped_value(one, one / 2, 0 * one, 0.2).item() == pytest.approx(0.5)
    assert clipped_value(one, one / 2, 2 * one, None).item() == pytest.approx(0.5)


Q, P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "mean", "spread"), [("k1", 0.0252672, 0.2216), ("k2", 0.0248624, 0.0143), ("k3", 0.0252672, 0.0160)]
)
def test_kl_estimators_by_hand(kind: str, mean: float, spread: float) -> None:
    found = kl_estimate(Q.log() - P.log(), kind)
    assert float((Q * found).sum()) == pytest.approx(mean, abs=1e-7)
    assert float((Q * (found - mean) ** 2).sum().sqrt()) == pytest.approx(spread, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "gradient"), [("k1", [0, 0, 0]), ("k2", [0.09894, -0.09388, -0.00505]), ("k3", [0.1, -0.1, 0])]
)
def test_gradients_of_kl_estimators_as_losses(kind: str, gradient: list[float]) -> None:
    """Averaged over what q samples: only k2 has the gradient of the KL itself."""
    logits = Q.log().clone().requires_grad_()
    logq = logits.log_softmax(-1)
    (found,) = torch.autograd.grad((Q * kl_estimate(logq - P.log(), kind)).sum(), logits)
    torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64), atol=1e-5, rtol=0)


def test_group_advantages_by_hand() -> None:
    score, group = torch.tensor([1.0, 2, 3, 6, 5, 5]), torch.tensor([0, 0, 0, 0, 1, 1])
    torch.testing.assert_close(group_relative(score, group), torch.tensor([-2.0, -1, 0, 3, 0, 0]))
    torch.testing.assert_close(leave_one_out(score, group)[:4], torch.tensor([-8 / 3, -4 / 3, 0, 4]))
    scaled = group_relative(score, group, scale=True)
    torch.testing.assert_close(scaled[:4], torch.tensor([-2.0, -1, 0, 3]) / (14 / 4) ** 0.5, atol=1e-3, rtol=0)
    assert (scaled[4:] == 0).all()


def two_groups(scores: list[float]) -> tuple[Trajectory, Tensor]:
    """Two prompts with two answers of two tokens each, and rewards: scores, less 0.1 a nat of 2, 4, 1 and 1 nats."""
    batch = Trajectory.of([Tree([1], [[2, 3], [4, 5]], scores[:2]), Tree([6], [[7, 8], [9, 10]], scores[2:])])
    reward = torch.tensor([0.0, -0.2, 0, 0, -0.4, 0, -0.1, 0, 0, -0.1])
    reward[batch.last] += batch.score
    return batch, reward


def test_scale_is_of_the_score_alone() -> None:
    """By hand: answers that score the same differ by their KL's price alone, 0.2 against 0.4, 0.1 from its mean, while
    scores of 1 and 3 lie one standard deviation from theirs and cost the same."""
    batch, reward = two_groups([5.0, 5.0, 1.0, 3.0])
    advantage, _ = GroupRelative(scale=True)(batch, reward)
    one = 1 / (1 + 1e-4)
    expected = torch.tensor([0, 0.1, 0.1, -0.1, -0.1, 0, -one, -one, one, one])
    torch.testing.assert_close(advantage, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(GroupRelative()(batch, reward)[0][6:], torch.tensor([-1.0, -1, 1, 1]))


@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_scores_are_worth_nothing_at_all(score: float) -> None:
    """Not even what rounding makes of their mean: three times a tenth is not three tenths."""
    same, group = torch.full((3001,), score), torch.zeros(3001, dtype=torch.long)
    assert (group_relative(same, group) == 0).all() and (group_relative(same, group, scale=True) == 0).all()
    assert (whiten(same, torch.ones(3001)) == 0).all()
    assert whiten(same[:1], torch.ones(1)).tolist() == [0.0]
    assert (whiten(same, torch.zeros(3001)) == 0).all(), "no token at all"


def test_a_response_alone_and_none_at_all() -> None:
    empty: Tensor = torch.zeros(0)
    assert len(group_relative(empty, empty.long())) == 0
    assert gae(torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool))[0].shape == (0, 0)
