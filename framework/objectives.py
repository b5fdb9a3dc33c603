"""Objectives of direct preference optimisation: pure functions of log-ratios, chosen by class path.

An objective is called with the log-ratios log π(y) - log π_ref(y) of the better and the worse response of M pairs, in
nats, [M] fp32 each, summed over response tokens, or averaged over them where `per_token` is true. It returns the loss
of each pair, [M].

Below, d = better - worse, and σ is the logistic function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leyden.shapes import check_shapes


class Objective(ABC):
    """The loss of pairs; see the module."""

    per_token: bool = False
    """Whether it is given averages over a response's tokens instead of sums."""
    beta: float = 1.0
    """What a log-ratio is multiplied with to be logged as a reward."""

    @abstractmethod
    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        """Log-ratios of the better and of the worse responses, [M] nats each, to losses [M]."""


def difference(better: Tensor, worse: Tensor) -> Tensor:
    """d = better - worse: [M], [M] -> [M]. Raises `ValueError` where shapes or dtypes do not match."""
    check_shapes(better=(better, "M"), worse=(worse, "M"))
    return better - worse


def _need(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


@dataclass
class Sigmoid(Objective):
    """-(1 - ε) log σ(β d) - ε log σ(-β d): DPO (Rafailov et al. 2023, eq. 7); with ε > 0 conservative DPO.

    Args:
        beta: β, how strongly the policy is held to the reference, in 1 / nats. The loss of a new policy is ln 2.
        label_smoothing: ε, the share of labels believed to be wrong, below 0.5.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _need(self.beta > 0 and 0 <= self.label_smoothing < 0.5, f"{self}: beta > 0, 0 <= label_smoothing < 0.5")

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        logit, smoothing = self.beta * difference(better, worse), self.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(logit) - smoothing * F.logsigmoid(-logit)


@dataclass
class Robust(Sigmoid):
    """(-(1 - ε) log σ(β d) + ε log σ(-β d)) / (1 - 2 ε): unbiased under label noise (Chowdhury et al. 2024).

    Args:
        beta: β, how strongly the policy is held to the reference, in 1 / nats.
        label_smoothing: ε, the share of labels that are wrong, below 0.5.
    """

    label_smoothing: float = 0.1

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        logit, smoothing = self.beta * difference(better, worse), self.label_smoothing
        return (-(1 - smoothing) * F.logsigmoid(logit) + smoothing * F.logsigmoid(-logit)) / (1 - 2 * smoothing)


@dataclass
class Hinge(Objective):
    """max(0, 1 - β d): SLiC's loss on log-ratios (Zhao et al. 2023; Liu et al. 2024).

    Args:
        beta: β, 1 / the margin in nats beyond which a pair no longer counts.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _need(self.beta > 0, f"{self}: beta > 0")

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        return torch.relu(1 - self.beta * difference(better, worse))


@dataclass
class IPO(Objective):
    """(d - 1 / (2 β))^2: a squared distance to a fixed margin (Azar et al. 2023, eq. 17).

    Args:
        beta: β, the paper's τ; the margin aimed at is 1 / (2 β) nats.
        per_token: whether log-ratios are averaged over a response's tokens instead of summed. The paper sums; several
            implementations average, so that the same beta asks for a far larger margin.
    """

    beta: float = 0.1
    per_token: bool = False

    def __post_init__(self) -> None:
        _need(self.beta > 0, f"{self}: beta > 0")

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        return (difference(better, worse) - 1 / (2 * self.beta)) ** 2
