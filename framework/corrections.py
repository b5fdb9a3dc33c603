"""Corrections of samples that another distribution gave than the one that is trained, chosen by class path.

An engine with kernels or a precision of its own samples y_t from μ, and training computes π_old with the same weights.
A correction is called with a batch and the log-ratio log π_old(y_t) - log μ(y_t) of each token, [T] fp32 nats, and
returns the weight of each token, [T], that its loss is multiplied by; what losses are divided by stays as it is. The
gradient does not pass through the weights. A new one is a class in a file of yours:
`--model.correction my_file.MyCorrection`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leyden.batch.trajectory import Trajectory
from leyden.shapes import check_shapes

Level = Literal["token", "sequence"]
LARGEST = 80.0
"""Nats beyond which no weight grows: exp(88.8) is infinite in fp32."""


def importance_weight(log_ratio: Tensor) -> Tensor:
    """w = π_old / μ of each token: [T] nats -> [T], at most exp(80), without a gradient.

    Args:
        log_ratio: [T] log w.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(log_ratio=(log_ratio, "T"))
    return log_ratio.detach().clamp_max(LARGEST).exp()


def truncated_weight(log_ratio: Tensor, cap: float) -> Tensor:
    """min(w, C) of each token: [T] nats -> [T] (Ionides 2008).

    Args:
        log_ratio: [T] log w.
        cap: C.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    return importance_weight(log_ratio).clamp_max(cap)


def masked_weight(log_ratio: Tensor, low: float, high: float) -> Tensor:
    """w of each token where low <= w <= high, else 0: [T] nats -> [T].

    Args:
        log_ratio: [T] log w.
        low: smallest weight that is kept.
        high: largest weight that is kept.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    weight = importance_weight(log_ratio)
    return torch.where((weight >= low) & (weight <= high), weight, 0.0)


def summed_over_response(batch: Trajectory, log_ratio: Tensor) -> Tensor:
    """log π_old(y) - log μ(y) of a token's whole response: [T] nats -> [T], 0 on prompts and padding.

    Args:
        batch: says which tokens are one response.
        log_ratio: [T] of each token.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(log_ratio=(log_ratio, "T"), branch=(batch.branch, "int T"))
    responses = len(batch.group)
    place = torch.where(batch.branch < 0, responses, batch.branch)
    total = log_ratio.new_zeros(responses + 1, dtype=torch.float64).index_add(0, place, log_ratio.double())
    return batch.per_token(total[:responses]).to(log_ratio.dtype)


class Correction(ABC):
    """Weights of sampled tokens; see the module."""

    @abstractmethod
    def __call__(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        """Weights [T] from log-ratios [T] in nats, which are 0 on prompts and padding. `batch` says which tokens are a
        response's, and holds whole responses."""

    def corrected(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        """[T] bool, which tokens have another weight than π_old / μ, truncated or masked; what rollout/corrected is the
        share of. None by default."""
        return torch.zeros_like(log_ratio, dtype=torch.bool)


@dataclass
class NoCorrection(Correction):
    """Every weight is 1: samples of another distribution are taken for those of the policy."""

    def __call__(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        return torch.ones_like(log_ratio)


@dataclass
class TIS(Correction):
    """Truncated importance sampling, min(w, C) (Ionides 2008; Espeholt et al. 2018, section 4.1; for engines Yao et al.
    2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").

    For one token w = π_old(y_t) / μ(y_t). Weights of tokens leave the distribution of the other tokens uncorrected;
    that of the sequence, their product, has no bias below the cap and a variance that grows with length.

    Args:
        cap: C, the largest weight, 1 or more.
        level: `token` for a weight of each token, `sequence` for one of a response, the same for all its tokens.

    Raises:
        ValueError: `cap` is below 1, or there is no such level.
    """

    cap: float = 2.0
    level: Level = "token"

    def __post_init__(self) -> None:
        _check(self.cap, self.level)

    def __call__(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        return truncated_weight(_at_level(batch, log_ratio, self.level), self.cap)

    def corrected(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        return importance_weight(_at_level(batch, log_ratio, self.level)) > self.cap


@dataclass
class MIS(Correction):
    """Masked importance sampling, w where w <= C, else 0 (Liu, Li et al. 2025, "When Speed Kills Stability:
    Demystifying RL Collapse from the Training-Inference Mismatch"): nothing is learnt from what the policy says far
    more often than the engine.

    Deviation: what is masked still counts in the denominator of the mean, so that the weights of other tokens do not
    depend on it.

    Args:
        cap: C, the largest weight that is kept, 1 or more.
        level: `sequence` for one weight of a response, the product over its tokens, or `token` for one of each token.

    Raises:
        ValueError: `cap` is below 1, or there is no such level.
    """

    cap: float = 2.0
    level: Level = "sequence"

    def __post_init__(self) -> None:
        _check(self.cap, self.level)

    def __call__(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        return masked_weight(_at_level(batch, log_ratio, self.level), 0.0, self.cap)

    def corrected(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        return importance_weight(_at_level(batch, log_ratio, self.level)) > self.cap


@dataclass
class IcePop(Correction):
    """Masking on both sides, w of a token where α <= w <= β, else 0 (Ling team 2025, "Every Step Evolves: Scaling
    Reinforcement Learning for Trillion-Scale Thinking Model").

    Args:
        low: α, the smallest weight that is kept, from 0 to 1.
        high: β, the largest weight that is kept, 1 or more.

    Raises:
        ValueError: 1, the weight of the policy's own samples, is not between `low` and `high`.
    """

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(f"low {self.low} high {self.high}: 0 <= low <= 1 <= high is needed; 0.5 and 5 are usual")

    def __call__(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        return masked_weight(log_ratio, self.low, self.high)

    def corrected(self, batch: Trajectory, log_ratio: Tensor) -> Tensor:
        weight = importance_weight(log_ratio)
        return (weight < self.low) | (weight > self.high)


def _at_level(batch: Trajectory, log_ratio: Tensor, level: Level) -> Tensor:
    """[T] the log-ratio of each token, or of the response that it is part of."""
    return log_ratio if level == "token" else summed_over_response(batch, log_ratio)


def _check(cap: float, level: str) -> None:
    if not cap >= 1:
        raise ValueError(f"cap {cap}: it must be 1 or more, the weight of the policy's own samples; 2 is usual")
    if level not in ("token", "sequence"):
        raise ValueError(f"level {level}: use token or sequence")
