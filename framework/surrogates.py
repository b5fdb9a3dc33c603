"""Surrogate losses of policy-gradient algorithms, one number for each sampled token, chosen by class path.

A surrogate is called with a batch, the log-ratio log ρ = log π(y_t) - log π_old(y_t) of each token now against when it
was sampled, in nats, and the advantage A of each token, [T] fp32 each. It returns the loss of each token, [T], and
`average` makes one number of them. A new one is a class in a file of yours: `--model.surrogate my_file.MySurrogate`.

Where the policy is still the one that sampled, ρ = 1 and the gradient of each surrogate is that of -A log π(y_t): they
differ in what becomes of a token, or a response, that has moved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leyden.batch.forest import Batch
from leyden.batch.trajectory import Trajectory
from leyden.shapes import check_shapes

Average = Literal["tokens", "responses", "constant"]


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, clip: float, clip_high: float | None = None, dual: float | None = None
) -> Tensor:
    """max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε_high)) of each token: [T], [T] -> [T] (Schulman et al. 2017, eq. 7).

    With c, where A < 0 no more than -c A (Ye et al. 2020, eq. 5): a token that became far likelier although it was bad
    would otherwise have a loss without bound.

    Args:
        ratio: [T] ρ, probability of the token now over the one it was sampled with.
        advantage: [T] A.
        clip: ε.
        clip_high: ε_high (Yu et al. 2025, eq. 10); None is ε.
        dual: c, above 1; None is no such bound.
    """
    check_shapes(ratio=(ratio, "T"), advantage=(advantage, "T"))
    high = clip if clip_high is None else clip_high
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + high))
    return loss if dual is None else torch.where(advantage < 0, torch.minimum(loss, -dual * advantage), loss)


def average(batch: Batch, loss: Tensor, over: Average = "tokens", longest: int = 1) -> Tensor:
    """This batch's share of a step's mean loss: [T] -> a scalar.

    `tokens`: every trained token of the step weighs the same (Yu et al. 2025, eq. 12). `responses`: every response
    does, and its tokens among themselves (Shao et al. 2024, eq. 3), so that tokens of long answers weigh less.
    `constant`: the sum over each response divided by the length limit (Liu et al. 2025, section 3.2). Only the last has
    the gradient of the mean reward, up to a factor: the others divide by what was sampled.

    Args:
        batch: knows the totals of the whole step.
        loss: [T] of each token.
        over: what weighs the same.
        longest: the length limit in tokens.
    """
    if over == "tokens":
        return batch.token_mean(loss)
    if over == "responses":
        return batch.response_mean(batch.branch_mean(loss))
    return batch.response_mean(batch.per_branch(loss)) / longest


class Surrogate(ABC):
    """The loss of sampled tokens; see the module."""

    @abstractmethod
    def __call__(self, batch: Trajectory, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Losses [T] from log-ratios [T] in nats and advantages [T]. `batch` says which tokens are a response's."""

    def clipped(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        """[T] bool, which tokens are so far from where they were sampled that their gradient may have ended; what
        policy/clip_fraction is the share of. None by default."""
        return torch.zeros_like(log_ratio, dtype=torch.bool)


@dataclass
class Clip(Surrogate):
    """PPO's clipped ratio (Schulman et al. 2017, eq. 7); with `clip_high` above `clip` that of DAPO (Yu et al. 2025,
    eq. 10), which lets unlikely tokens grow further.

    Args:
        clip: ε, how far the probability of a token may move within a rollout before its gradient ends.
        clip_high: ε_high, how far it may rise; None is ε.
        dual: c, the most that |A| may be multiplied with where A < 0 (Ye et al. 2020, eq. 5: 3); None is no bound.

    Raises:
        ValueError: `clip` is not above 0, `clip_high` below it, or `dual` not above 1.
    """

    clip: float = 0.2
    clip_high: float | None = None
    dual: float | None = None

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip {self.clip}: it must be above 0; 0.2 is usual")
        if self.clip_high is not None and not self.clip_high > 0:
            raise ValueError(f"clip_high {self.clip_high}: it must be above 0; 0.28 is usual")
        if self.dual is not None and not self.dual > 1:
            raise ValueError(f"dual {self.dual}: it must be above 1; 3 is usual")

    def __call__(self, batch: Trajectory, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return clipped_surrogate(log_ratio.exp(), advantage, self.clip, self.clip_high, self.dual)

    def clipped(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        return outside(log_ratio.exp(), self.clip, self.clip_high)


@dataclass
class Reinforce(Surrogate):
    """-A log π(y_t), without a ratio (Williams 1992). Its gradient is right in the first step on a rollout only: later
    ones, of further minibatches or passes, take no notice of how far the policy has moved. The loss shown is -A log ρ,
    which has the same gradient and is 0 where nothing has moved."""

    def __call__(self, batch: Trajectory, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        check_shapes(log_ratio=(log_ratio, "T"), advantage=(advantage, "T"))
        return -advantage * log_ratio


@dataclass
class SequenceRatio(Surrogate):
    """GSPO: the clipped ratio of whole responses, s = (π(y) / π_old(y))^(1 / |y|) (Zheng et al. 2025, eq. 5 and 7).

    It is written as the token form of eq. 13 to 14, s_t = sg[s] π(y_t) / sg[π(y_t)] where sg takes no gradient: equal
    in value, and in gradient where all tokens of a response have one advantage, and averaged over responses.

    Args:
        clip: ε of the lower bound 1 - ε. The mean of many tokens moves little, so that it is far smaller than PPO's.
        clip_high: ε of the upper bound.

    Raises:
        ValueError: one of them is not above 0.
    """

    clip: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        if not (self.clip > 0 and self.clip_high > 0):
            raise ValueError(f"clip {self.clip}, clip_high {self.clip_high}: above 0; 3e-4 and 4e-4 are usual")

    def __call__(self, batch: Trajectory, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        whole = batch.per_token(batch.branch_mean(log_ratio.detach()))
        return clipped_surrogate((whole + log_ratio - log_ratio.detach()).exp(), advantage, self.clip, self.clip_high)

    def clipped(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        return outside(batch.per_token(batch.branch_mean(log_ratio)).exp(), self.clip, self.clip_high)


@dataclass
class CISPO(Surrogate):
    """-sg[min(ρ, cap)] A log π(y_t), where sg takes no gradient: the weight of a token is bounded, and no token's
    gradient ends (MiniMax 2025, eq. 4 and 5, without the lower bound, as there). The loss shown has log ρ for log π,
    which has the same gradient.

    Args:
        cap: 1 + ε_high, the largest weight.

    Raises:
        ValueError: `cap` is not above 0.
    """

    cap: float = 5.0

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"cap {self.cap}: it must be above 0; 5 is usual")

    def __call__(self, batch: Trajectory, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        check_shapes(log_ratio=(log_ratio, "T"), advantage=(advantage, "T"))
        return -log_ratio.detach().exp().clamp(max=self.cap) * advantage * log_ratio

    def clipped(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        """Tokens whose weight is bounded."""
        return log_ratio.exp() > self.cap


def outside(ratio: Tensor, clip: float, clip_high: float | None) -> Tensor:
    """Whether each ratio is out of [1 - ε, 1 + ε_high]: [T] -> [T] bool.

    Args:
        ratio: [T] ρ.
        clip: ε.
        clip_high: ε_high; None is ε.
    """
    return (ratio < 1 - clip) | (ratio > 1 + (clip if clip_high is None else clip_high))
