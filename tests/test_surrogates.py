"""Surrogate losses, means over a step, estimators and reward shaping: by hand, with gradients, and against formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from leyden.advantages import GAE, LeaveOneOut, Whitened, whiten
from leyden.batch import Totals, Trajectory, Tree
from leyden.on_policy import ScoreTransform
from leyden.on_policy.reward_shaping import overlong_share, truncated
from leyden.surrogates import CISPO, Clip, Reinforce, SequenceRatio, Surrogate, average, clipped_surrogate


def trajectory() -> Trajectory:
    """Two prompts; responses of 3, 1 and 2 tokens, and of 4."""
    return Trajectory.of([Tree([1, 2], [[3, 4, 5], [6], [7, 8]], [1.0, 2.0, 6.0]), Tree([9], [[1, 2, 3, 4]], [5.0])])


def some(seed: int = 0, spread: float = 0.3) -> tuple[Trajectory, Tensor, Tensor]:
    """A batch with log-ratios that have a gradient, and advantages, one a response."""
    batch, generator = trajectory(), torch.Generator().manual_seed(seed)
    on = (batch.branch >= 0).float()
    log_ratio = spread * torch.randn(len(batch), generator=generator) * on
    return batch, log_ratio.requires_grad_(), batch.per_token(torch.tensor([1.5, -0.5, -1.0, 2.0]))


def slope(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


# -- surrogates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.25, 1, -1.25, -1),  # below 1 + ε_high
        (1.5, 1, -1.28, 0),
        (1.5, -1, 1.5, 1),  # dual clip is far
        (4.0, -1, 3.0, 0),  # and here it ends the gradient
        (0.5, -1, 0.8, 0),
        (0.5, 1, -0.5, -1),
    ],
)
def test_two_bounds_and_the_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    p = torch.tensor([ratio], requires_grad=True)
    found = clipped_surrogate(p, torch.tensor([float(advantage)]), 0.2, 0.28, 3.0)
    assert found.item() == pytest.approx(loss)
    assert slope(found, p).item() == gradient


def test_clip_fractions_have_the_bounds_of_the_loss() -> None:
    batch, _, _ = some()
    at = torch.tensor([0.75, 0.85, 1.0, 1.25, 1.3, 4.0, 6.0]).log()
    log_ratio = torch.zeros(len(batch)).index_copy(0, torch.arange(2, 9), at)
    for surrogate, expected in (
        (Clip(0.2), [1, 0, 0, 1, 1, 1, 1]),
        (Clip(0.2, 0.28), [1, 0, 0, 0, 1, 1, 1]),
        (CISPO(5.0), [0, 0, 0, 0, 0, 0, 1]),
        (Reinforce(), [0] * 7),
    ):
        assert surrogate.clipped(batch, log_ratio)[2:9].int().tolist() == expected, surrogate


@pytest.mark.parametrize("surrogate", [Clip(), Clip(0.2, 0.28, 3.0), Reinforce(), SequenceRatio(), CISPO()])
def test_where_nothing_has_moved_all_gradients_are_that_of_reinforce(surrogate: Surrogate) -> None:
    batch, _, advantage = some()
    log_ratio = torch.zeros(len(batch), requires_grad=True)
    torch.testing.assert_close(slope(surrogate(batch, log_ratio, advantage), log_ratio), -advantage)


def test_cispo_by_hand() -> None:
    """Each token keeps a gradient of its bounded ratio."""
    batch, log_ratio, advantage = some(spread=2.0)
    found = slope(CISPO(1.5)(batch, log_ratio, advantage), log_ratio)
    torch.testing.assert_close(found, -log_ratio.detach().exp().clamp(max=1.5) * advantage)
    assert (log_ratio.exp() > 1.5).any()


def gspo(batch: Trajectory, log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Zheng et al. 2025, eq. 5 and 7, response by response."""
    losses = []
    for span in batch.structure():
        for _, start, stop in span.responses:
            s, a = log_ratio[start:stop].mean().exp(), advantage[start]
            losses.append(-torch.minimum(s * a, s.clamp(1 - low, 1 + high) * a))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("spread", [1e-4, 3e-2, 0.5])
def test_the_sequence_ratio_is_that_of_whole_responses(spread: float) -> None:
    batch, log_ratio, advantage = some(3, spread)
    surrogate = SequenceRatio(0.01, 0.02)
    expected = gspo(batch, log_ratio, advantage, 0.01, 0.02)
    found = average(batch, surrogate(batch, log_ratio, advantage), "responses")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope(found, log_ratio), slope(expected, log_ratio))
    share = torch.stack([log_ratio[i:j].mean().exp() for s in batch.structure() for _, i, j in s.responses])
    outside = ((share < 0.99) | (share > 1.02)).float()
    torch.testing.assert_close(batch.branch_mean(surrogate.clipped(batch, log_ratio).float()), outside)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Clip(0.0),
        lambda: Clip(0.2, 0.0),
        lambda: Clip(dual=1.0),
        lambda: SequenceRatio(0.0),
        lambda: SequenceRatio(clip_high=-1.0),
        lambda: CISPO(0.0),
        lambda: ScoreTransform(overlong=-1),
    ],
)
def test_bounds_that_make_no_sense(wrong: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"above|or more"):
        wrong()


# -- means over a step -------------------------------------------------------------------------------------------------


def test_means_by_hand() -> None:
    """Responses of 3, 1, 2 and 4 tokens whose losses are 1, 2, 3, 4."""
    batch = trajectory()
    loss = batch.per_token(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert average(batch, loss, "tokens").item() == pytest.approx((3 * 1 + 1 * 2 + 2 * 3 + 4 * 4) / 10)
    assert average(batch, loss, "responses").item() == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert average(batch, loss, "constant", 8).item() == pytest.approx((3 + 2 + 6 + 16) / 8 / 4)


@pytest.mark.parametrize("over", ["tokens", "responses", "constant"])
def test_means_of_parts_add_up_to_that_of_the_whole(over: Any) -> None:
    batch, loss = trajectory(), torch.randn(len(trajectory()))
    parts = [(batch.select([i]), loss[span.start : span.stop]) for i, span in enumerate(batch.structure())]
    found = sum(average(part, x, over, 5) for part, x in parts)
    torch.testing.assert_close(found, average(batch, loss, over, 5))


@pytest.mark.parametrize("over", ["tokens", "responses", "constant"])
def test_a_response_without_weight_has_no_gradient_and_divides_nothing_by_zero(over: Any) -> None:
    batch = trajectory()
    batch = replace(batch, weight=batch.weight * (batch.branch != 1), totals=Totals(9.0, 4, 2))
    loss = torch.ones(len(batch), requires_grad=True)
    gradient = slope(average(batch, loss, over, 8), loss)
    assert gradient.isfinite().all() and (gradient[batch.branch == 1] == 0).all()
    assert (gradient[batch.branch == 0] > 0).all()


# -- estimators --------------------------------------------------------------------------------------------------------


def rewarded(price: float = 0.1) -> tuple[Trajectory, Tensor]:
    batch, log_ratio, _ = some(5)
    reward = -price * log_ratio.detach() * batch.weight
    reward[batch.last] += batch.score
    return batch, reward


def test_whitened_is_the_reward_to_come_whitened() -> None:
    batch, reward = rewarded()
    expected = torch.zeros_like(reward)
    for span in batch.structure():
        for _, start, stop in span.responses:
            for t in range(start, stop):
                expected[t] = reward[t:stop].sum()
    found, returns = Whitened()(batch, reward)
    torch.testing.assert_close(found, whiten(expected, batch.weight))
    on = batch.weight > 0
    assert found[on].mean().abs() < 1e-6 and float(found[on].var(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert (returns == 0).all() and (found[~on] == 0).all()
    batch.value = torch.zeros_like(reward)  # values of 0 and λ 1 make the same of generalised advantages
    torch.testing.assert_close(found, GAE(trace=1.0)(batch, reward)[0])


def test_whitened_with_the_mean_of_the_group_taken_off() -> None:
    batch, reward = rewarded()
    whole = batch.per_branch(reward)
    centred = torch.cat([whole[:3] - whole[:3].mean(), whole[3:] - whole[3]])
    found, _ = Whitened(group=True)(batch, reward)
    torch.testing.assert_close(found, whiten(batch.per_token(centred), batch.weight))
    assert (Whitened().least_samples, Whitened(group=True).least_samples, LeaveOneOut().least_samples) == (1, 2, 2)


# -- what becomes of scores --------------------------------------------------------------------------------------------


def test_soft_overlong_penalty_by_hand() -> None:
    """Yu et al. 2025, eq. 13, with L_max 20 and L_cache 4."""
    length = torch.tensor([1.0, 16.0, 17.0, 19.0, 20.0])
    torch.testing.assert_close(overlong_share(length, 20, 4), torch.tensor([0.0, 0.0, 0.25, 0.75, 1.0]))
    score, logged = ScoreTransform(overlong=0.5, overlong_penalty=0.5)(trajectory(), {0}, 4)
    assert score.tolist() == [1 - 0.25, 2, 6, 5 - 0.5] and logged["rollout/overlong"] == pytest.approx(0.75 / 4)


def test_truncated_responses_are_those_without_an_end() -> None:
    assert truncated(trajectory(), {6, 8}).tolist() == [True, False, False, True]
