"""Objectives of direct preference optimisation: pure functions of log-ratios, chosen by class path.

An objective is called with the log-ratios log π(y) - log π_ref(y) of the better and the worse response of M pairs, in
nats, [M] fp32 each, summed over response tokens, or averaged over them where `per_token` is true. Where
`needs_reference` is false it is called with log-probs log π(y) instead, and no reference is loaded. It returns the loss
of each pair, [M].

Below, w and l are what it is given of the better and the worse response, d = w - l, and σ is the logistic function.
Objectives that sort a batch (AOT: Melnyk et al. 2024) are none of these: the loss of a pair would depend on which
others stand in its micro-batch.
"""

from __future__ import annotations

import math
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
    needs_reference: bool = True
    """Whether it is given log-ratios; else log-probs, and there is no reference."""
    beta: float = 1.0
    """What a log-ratio (or log-prob) is multiplied with to be logged as a reward."""

    @abstractmethod
    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        """Log-ratios (or log-probs) of the better and of the worse responses, [M] nats each, to losses [M]."""


def difference(better: Tensor, worse: Tensor) -> Tensor:
    """d = better - worse: [M], [M] -> [M].

    Args:
        better: [M] of the better responses, in nats.
        worse: [M] of the worse ones.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
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


@dataclass
class APOZero(Objective):
    """1 - σ(β w) + σ(β l): better responses up, worse ones down, each by itself (D'Oosterlinck et al. 2024, eq. 7), for
    better responses that are better than what the model says. The loss of a new policy is 1.

    Args:
        beta: β, how strongly the policy is held to the reference, in 1 / nats.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _need(self.beta > 0, f"{self}: beta > 0")

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        check_shapes(better=(better, "M"), worse=(worse, "M"))
        return 1 - torch.sigmoid(self.beta * better) + torch.sigmoid(self.beta * worse)


@dataclass
class APODown(APOZero):
    """1 - σ(β d) + σ(β w): both down, the worse one further (D'Oosterlinck et al. 2024, eq. 8), for better responses
    that are worse than what the model says. The loss of a new policy is 1.

    Args:
        beta: β, how strongly the policy is held to the reference, in 1 / nats.
    """

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        d = difference(better, worse)
        return 1 - torch.sigmoid(self.beta * d) + torch.sigmoid(self.beta * better)


@dataclass
class NCA(APOZero):
    """-log σ(β w) - (log σ(-β w) + log σ(-β l)) / 2: noise-contrastive alignment of pairs, which keeps better responses
    from losing likelihood (Chen et al. 2024). The loss of a new policy is 2 ln 2.

    Args:
        beta: β, the paper's 1 / α, in 1 / nats.
    """

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        check_shapes(better=(better, "M"), worse=(worse, "M"))
        w, l = self.beta * better, self.beta * worse  # noqa: E741
        return -F.logsigmoid(w) - 0.5 * (F.logsigmoid(-w) + F.logsigmoid(-l))


@dataclass
class EXO(Objective):
    """The reverse KL of σ(β d) and 1 - σ(β d) from 1 - ε and ε (Ji et al. 2024, eq. 16, for two responses).

    Args:
        beta: β, how strongly the policy is held to the reference, in 1 / nats.
        label_smoothing: ε, above 0 and below 0.5: without it the loss would be infinite.
    """

    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        _need(self.beta > 0 and 0 < self.label_smoothing < 0.5, f"{self}: beta > 0, 0 < label_smoothing < 0.5")

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        logit = self.beta * difference(better, worse)
        right = torch.sigmoid(logit) * (F.logsigmoid(logit) - math.log1p(-self.label_smoothing))
        return right + torch.sigmoid(-logit) * (F.logsigmoid(-logit) - math.log(self.label_smoothing))


@dataclass
class SimPO(Objective):
    """-log σ(β d - γ) of log-probs averaged over tokens, without a reference (Meng et al. 2024, eq. 6).

    Args:
        beta: β, in tokens / nat: of averages, so some ten times that of objectives of sums.
        gamma: γ, the margin aimed at, of the same unit as β d.
    """

    per_token = True
    needs_reference = False
    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _need(self.beta > 0 and self.gamma >= 0, f"{self}: beta > 0, gamma >= 0")

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        return -F.logsigmoid(self.beta * difference(better, worse) - self.gamma)


@dataclass
class CPO(Sigmoid):
    """DPO's loss of log-probs instead of log-ratios, without a reference (Xu et al. 2024). The likelihood term of
    the paper is `--model.sft_weight 1`, here averaged over tokens.

    Args:
        beta: β, in 1 / nats.
        label_smoothing: ε, the share of labels believed to be wrong, below 0.5.
    """

    needs_reference = False


@dataclass
class ORPO(Objective):
    """-w - λ log σ(log odds(w) - log odds(l)) of log-probs averaged over tokens, with odds(x) = e^x / (1 - e^x) and
    without a reference (Hong et al. 2024, eq. 6 and 7). -w is the cross-entropy of the better response, so no
    `sft_weight` is needed.

    Args:
        beta: λ, the weight of the odds ratio beside the cross-entropy.
    """

    per_token = True
    needs_reference = False
    beta: float = 0.1

    def __post_init__(self) -> None:
        _need(self.beta > 0, f"{self}: beta > 0")

    def __call__(self, better: Tensor, worse: Tensor) -> Tensor:
        check_shapes(better=(better, "M"), worse=(worse, "M"))
        return -better - self.beta * F.logsigmoid(log_odds(better) - log_odds(worse))


def log_odds(logp: Tensor) -> Tensor:
    """x - log(1 - e^x) of log-probs x <= 0: [M] -> [M] nats.

    A probability that rounds to 1 has the odds of the largest one below 1, since its own are infinite.

    Args:
        logp: [M] x, in nats.
    """
    x = logp.clamp_max(-torch.finfo(logp.dtype).eps / 2)
    likely = x > -math.log(2)  # each form is exact on its own side; the other is not given x, as its slope may be inf
    log_rest = torch.where(
        likely,
        torch.log(-torch.expm1(torch.where(likely, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(likely, -1.0, x))),
    )
    return x - log_rest
