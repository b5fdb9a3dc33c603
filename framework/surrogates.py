"""Surrogate losses of policy-gradient algorithms, one number for each sampled token, chosen by class path.

A surrogate is called with a batch, the log-ratio log ρ = log π(y_t) - log π_old(y_t) of each token now against when it
was sampled, in nats, and the advantage A of each token, [T] fp32 each. It returns the loss of each token, [T]; the
algorithm averages it. A new one is a class in a file of yours: `--model.surrogate my_file.MySurrogate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from leyden.batch.trajectory import Trajectory
from leyden.shapes import check_shapes


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε)) of each token: [T], [T] -> [T] (Schulman et al. 2017, eq. 7).

    Args:
        ratio: [T] ρ, probability of the token now over the one it was sampled with.
        advantage: [T] A.
        clip: ε.
    """
    check_shapes(ratio=(ratio, "T"), advantage=(advantage, "T"))
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


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
    """PPO's clipped ratio (Schulman et al. 2017, eq. 7).

    Args:
        clip: ε, how far the probability of a token may move within a rollout before its gradient ends.

    Raises:
        ValueError: `clip` is not above 0.
    """

    clip: float = 0.2

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip {self.clip}: it must be above 0; 0.2 is usual")

    def __call__(self, batch: Trajectory, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return clipped_surrogate(log_ratio.exp(), advantage, self.clip)

    def clipped(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        return (log_ratio.exp() - 1).abs() > self.clip
