"""Advantages: pure functions, and the estimators that are made of them, chosen by class path.

An estimator is called with a rollout's batch and the reward of each token, [T] fp32, and returns the advantage of each
token and the returns that values are trained on, [T] each. Where processes share a rollout it sees its own part, with
all responses to each of its prompts; sums over the whole are `reduce`'s. A new one is a class in a file of yours:
`--model.estimator my_file.MyEstimator`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from leyden.batch.trajectory import Trajectory
from leyden.distributed import Reduce, one_process
from leyden.shapes import check_shapes


def gae(
    reward: Tensor, value: Tensor, mask: Tensor, discount: float = 1.0, trace: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) and the returns that values are trained on.

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γ λ A_{t+1}        R_t = A_t + V_t

    After a response's last token everything is 0: the score stands on the last token, and padding, whatever it holds,
    is never looked at. A response that was cut at the length limit ends there too.

    Args:
        reward: [N, L] r, of each token, one response a row, tokens on the left.
        value: [N, L] V, of the state before each token.
        mask: [N, L] bool, False on padding.
        discount: γ, of the reward of the next token.
        trace: λ, 1 for plain returns, 0 for one step.

    Returns:
        Advantages and returns, [N, L] each, 0 on padding. Returns belong to advantages before any whitening.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(reward=(reward, "N L"), value=(value, "N L"), mask=(mask, "bool N L"))
    reward, value = reward.masked_fill(~mask, 0.0), value.masked_fill(~mask, 0.0)
    after = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    advantage, running = torch.zeros_like(reward), reward.new_zeros(len(reward))
    for t in reversed(range(reward.shape[1])):
        running = reward[:, t] + discount * after[:, t] - value[:, t] + discount * trace * running
        running = running.masked_fill(~mask[:, t], 0.0)
        advantage[:, t] = running
    return advantage, (advantage + value).masked_fill(~mask, 0.0)


def whiten(x: Tensor, weight: Tensor, reduce: Reduce = one_process) -> Tensor:
    """Weighted mean 0 and variance 1: [T], [T] -> [T], 0 where the weight is. The mean is not added back.

    Args:
        x: [T] numbers.
        weight: [T] of each in mean and variance.
        reduce: sums over the processes that hold the rest.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(x=(x, "T"), weight=(weight, "T"))
    exact, share = x.double(), weight.double()  # in single precision equal numbers would differ from their mean
    total, summed = reduce(torch.stack([share.sum(), (exact * share).sum()]))
    total = total.clamp_min(1e-8)
    centred = exact - summed / total
    variance = reduce((centred**2 * share).sum()) / total
    return torch.where(weight > 0, centred * (variance + 1e-8).rsqrt(), 0.0).to(x.dtype)


def explained_variance(value: Tensor, returns: Tensor, weight: Tensor, reduce: Reduce = one_process) -> float:
    """1 - Var(R - V) / Var(R) over the tokens whose weight is not 0: 1 where values are right, 0 where a constant would
    do as well, below 0 where it would do better.

    Args:
        value: [T] V.
        returns: [T] R.
        weight: [T] 0 leaves a token out.
        reduce: sums over the processes that hold the rest.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(value=(value, "T"), returns=(returns, "T"), weight=(weight, "T"))
    columns = torch.stack([returns - value, returns, torch.ones_like(value)])[:, weight > 0].double()
    sums = reduce(columns.sum(1))
    centred = columns[:2] - (sums[:2] / sums[2].clamp_min(1))[:, None]
    residual, total = reduce((centred**2).sum(1)) / (sums[2] - 1).clamp_min(1)
    return 1.0 - float(residual / total.clamp_min(1e-8))


def group_relative(score: Tensor, group: Tensor, scale: bool = False) -> Tensor:
    """Each response's score less the mean of its prompt's responses: [N], [N] -> [N].

    Args:
        score: [N] of each response.
        group: [N] int64, the prompt that each response answers.
        scale: divide by the standard deviation within the prompt (Shao et al. 2024, section 4.1.2). That is not the
            gradient of the mean reward: prompts whose responses nearly agree weigh most (Liu et al. 2025, section 3).

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(score=(score, "N"), group=(group, "int N"))
    exact, prompts = score.double(), int(group.max()) + 1 if len(group) else 0
    count = exact.new_zeros(prompts).index_add(0, group, torch.ones_like(exact)).clamp_min(1)
    centred = exact - (exact.new_zeros(prompts).index_add(0, group, exact) / count)[group]  # equal scores: exactly 0
    if scale:
        variance = exact.new_zeros(prompts).index_add(0, group, centred**2) / count
        centred = centred / (variance.sqrt() + 1e-4)[group]
    return centred.to(score.dtype)


def leave_one_out(score: Tensor, group: Tensor) -> Tensor:
    """Each response's score less the mean of the other responses to its prompt: [N], [N] -> [N], n > 1 each
    (Kool et al. 2019, eq. 8; RLOO).

    Args:
        score: [N] of each response.
        group: [N] number of its prompt.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(score=(score, "N"), group=(group, "int N"))
    prompts = int(group.max()) + 1 if len(group) else 0
    count = score.new_zeros(prompts).index_add(0, group, torch.ones_like(score))[group]
    return group_relative(score, group) * count / (count - 1)


class Estimator(ABC):
    """Advantages and returns of sampled tokens; see the module. `batch.score` [N] is what each response's score adds to
    its reward; the rest of the reward is the price of its KL."""

    needs_values: bool = False
    """Whether it reads `batch.value`, so that the algorithm must have a value function."""
    least_samples: int = 1
    """Fewest responses to each prompt that it can compare."""

    @abstractmethod
    def __call__(self, batch: Trajectory, reward: Tensor, reduce: Reduce = one_process) -> tuple[Tensor, Tensor]:
        """Advantages and returns, [T] each, from the reward [T] of each token; 0 on prompts and padding."""


@dataclass
class GAE(Estimator):
    """Generalised advantage estimation with whitened advantages (Schulman et al. 2016; Ouyang et al. 2022).

    Args:
        discount: γ, of the reward of the next token.
        trace: λ, 1 for plain returns.
    """

    discount: float = 1.0
    trace: float = 0.95
    needs_values = True

    def __call__(self, batch: Trajectory, reward: Tensor, reduce: Reduce = one_process) -> tuple[Tensor, Tensor]:
        advantage, returns = torch.zeros_like(reward), torch.zeros_like(reward)
        at, mask = batch.grid()
        row_advantage, row_returns = gae(reward[at], batch.value[at], mask, self.discount, self.trace)
        advantage[at[mask]], returns[at[mask]] = row_advantage[mask], row_returns[mask]
        return whiten(advantage, batch.weight, reduce), returns


@dataclass
class GroupRelative(Estimator):
    """A response's reward less the mean over its prompt's responses, the same for all its tokens (Shao et al. 2024).

    Args:
        scale: divide the score's part by the standard deviation of scores within the prompt, as published. The price of
            the KL is taken off as it is: responses that all score the same differ by nothing else.
    """

    scale: bool = False
    least_samples = 2

    def __call__(self, batch: Trajectory, reward: Tensor, reduce: Reduce = one_process) -> tuple[Tensor, Tensor]:
        whole = batch.per_branch(reward)
        advantage = group_relative(whole, batch.group)
        if self.scale:
            price = group_relative(whole - batch.score, batch.group)
            advantage = group_relative(batch.score, batch.group, scale=True) + price
        return batch.per_token(advantage), torch.zeros_like(reward)


@dataclass
class LeaveOneOut(Estimator):
    """A response's reward less the mean of the others to its prompt (Kool et al. 2019; Ahmadian et al. 2024)."""

    least_samples = 2

    def __call__(self, batch: Trajectory, reward: Tensor, reduce: Reduce = one_process) -> tuple[Tensor, Tensor]:
        score = batch.per_branch(reward)
        return batch.per_token(leave_one_out(score, batch.group)), torch.zeros_like(reward)


@dataclass
class Whitened(Estimator):
    """REINFORCE++: the reward that is still to come, whitened over all tokens of a rollout (Hu 2025, eq. 8 to 10).

    The mean over other prompts is no baseline of this one: prompts with high rewards have high advantages, whatever was
    answered. That costs variance, and no bias.

    Args:
        group: take off the mean of the prompt's responses first, so that a whole response has one advantage (the
            paper's REINFORCE++ with a baseline); it needs two responses or more.
    """

    group: bool = False

    @property
    def least_samples(self) -> int:  # type: ignore[override]
        return 2 if self.group else 1

    def __call__(self, batch: Trajectory, reward: Tensor, reduce: Reduce = one_process) -> tuple[Tensor, Tensor]:
        if self.group:
            advantage = batch.per_token(group_relative(batch.per_branch(reward), batch.group))
        else:
            at, mask = batch.grid()
            to_go, _ = gae(reward[at], torch.zeros_like(reward[at]), mask, trace=1.0)
            advantage = torch.zeros_like(reward)
            advantage[at[mask]] = to_go[mask]
        return whiten(advantage, batch.weight, reduce), torch.zeros_like(reward)
