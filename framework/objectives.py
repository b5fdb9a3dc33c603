"""What direct preference optimisation minimises: pure functions of log-ratios, chosen by class path.

An objective is called with the log-ratios log pi(y) - log ref(y) of the better and the worse response of M pairs, in
nats, [M] fp32 each, summed over response tokens, or averaged over them where `per_token` is true. It returns the loss
of each pair, [M].

Below, d = better - worse, and s is the logistic function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(ABC):
    """The loss of pairs; see the module."""

    per_token: bool = False
    """Whether it is given averages over a response's tokens instead of sums."""
    beta: float = 1.0
    """What a log-ratio is multiplied with to be logged as a reward."""

    @abstractmethod
    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        """Log-ratios of the better and of the worse responses, [M] nats each, to losses [M]."""


def _need(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


@dataclass
class Sigmoid(Objective):
    """-(1 - e) log s(beta d) - e log s(-beta d): DPO (Rafailov et al. 2023, eq. 7); with e > 0 conservative DPO.

    Args:
        beta: how strongly the policy is held to the reference, in 1 / nats. The loss of a new policy is ln 2.
        label_smoothing: e, the share of labels believed to be wrong, below 0.5.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _need(self.beta > 0 and 0 <= self.label_smoothing < 0.5, f"{self}: beta > 0, 0 <= label_smoothing < 0.5")

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        logit, e = self.beta * (better - worse), self.label_smoothing
        return -(1 - e) * F.logsigmoid(logit) - e * F.logsigmoid(-logit)


@dataclass
class Robust(Sigmoid):
    """(-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e): unbiased under label noise (Chowdhury et al. 2024).

    Args:
        beta: how strongly the policy is held to the reference, in 1 / nats.
        label_smoothing: e, the share of labels that are wrong, below 0.5.
    """

    label_smoothing: float = 0.1

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        logit, e = self.beta * (better - worse), self.label_smoothing
        return (-(1 - e) * F.logsigmoid(logit) + e * F.logsigmoid(-logit)) / (1 - 2 * e)


@dataclass
class Hinge(Objective):
    """max(0, 1 - beta d): SLiC's loss on log-ratios (Zhao et al. 2023; Liu et al. 2024).

    Args:
        beta: 1 / the margin in nats beyond which a pair no longer counts.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _need(self.beta > 0, f"{self}: beta > 0")

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        return torch.relu(1 - self.beta * (better - worse))


@dataclass
class IPO(Objective):
    """(d - 1 / (2 beta))^2: a squared distance to a fixed margin (Azar et al. 2023, eq. 17).

    Args:
        beta: the paper's tau; the margin aimed at is 1 / (2 beta) nats.
        per_token: whether log-ratios are averaged over a response's tokens instead of summed. The paper sums; several
            implementations average, so that the same beta asks for a far larger margin.
    """

    beta: float = 0.1
    per_token: bool = False

    def __post_init__(self) -> None:
        _need(self.beta > 0, f"{self}: beta > 0")

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        return (better - worse - 1 / (2 * self.beta)) ** 2
