"""Losses as pure functions of tensors, with their shapes, units and sources."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from leyden.shapes import check_shapes


def negative_log_likelihood(logp: Tensor, mean_logp: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each token, in nats: [T] -> [T].

    With label smoothing ε (Szegedy et al. 2016, section 7) the target is 1 - ε on the token and ε / V on every token
    of the vocabulary, so the loss is -(1 - ε) log π(y) - ε mean_v log π(v).

    Args:
        logp: [T] log-prob of each token.
        mean_logp: [T] mean log-prob over the vocabulary; needed when `smoothing` is not 0.
        smoothing: ε.

    Raises:
        ValueError: shapes or dtypes do not match, or `mean_logp` is missing.
    """
    check_shapes(logp=(logp, "T"), mean_logp=(mean_logp, "T"))
    if not smoothing:
        return -logp
    if mean_logp is None:
        raise ValueError("label smoothing needs mean_logp")
    return -(1 - smoothing) * logp - smoothing * mean_logp


def perplexity(loss: float) -> float:
    """exp(`loss`), of a mean in nats a token; infinite where it would overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def bradley_terry(difference: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log σ(r_better - r_worse - margin) of each pair: [M] -> [M] nats (Bradley & Terry 1952); σ is the logistic.

    Args:
        difference: [M] reward of the better response minus that of the worse one.
        margin: [M] by how much the difference should exceed 0 (Touvron et al. 2023, eq. 2).

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(difference=(difference, "M"), margin=(margin, "M"))
    return -F.logsigmoid(difference if margin is None else difference - margin)


def plackett_luce(scores: Tensor, mask: Tensor) -> Tensor:
    """-log of the probability of the whole ranking, in nats: [P, K] -> [P] (Plackett 1975; Luce 1959).

    The best is drawn with probability softmax(r), then the next among those left, and so on:
    -Σ_i (r_i - logsumexp(r_i … r_K)). For two responses that is Bradley-Terry without a margin.

    Args:
        scores: [P, K] rewards, best response first.
        mask: [P, K] bool, False on padding, which stands after the responses.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(scores=(scores, "P K"), mask=(mask, "bool P K"))
    low = scores.masked_fill(~mask, -1e30)  # finite, since the gradient at -inf would be nan
    after = low.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(mask, after - scores, 0.0).sum(-1)


def clipped_value(value: Tensor, old: Tensor, target: Tensor, clip: float | None) -> Tensor:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 of each token: [T] -> [T].

    From the implementation of Schulman et al. 2017, not its text; the units are those of rewards.

    Args:
        value: [T] V, now.
        old: [T] V_old, when the response was sampled.
        target: [T] R.
        clip: c; None for (V - R)^2 / 2.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(value=(value, "T"), old=(old, "T"), target=(target, "T"))
    loss = (value - target) ** 2
    if clip is not None:
        loss = torch.maximum(loss, (old + (value - old).clamp(-clip, clip) - target) ** 2)
    return 0.5 * loss


def kl_estimate(log_ratio: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(π || π_ref) from samples of π, with log_ratio = log π - log π_ref: [T] nats -> [T] nats.

    k1 = log_ratio has the right mean and belongs in a reward: its gradient as a loss is 0 on average. k2 =
    log_ratio^2 / 2 is biased, but is the loss whose gradient is that of the KL. k3 = exp(-log_ratio) - 1 + log_ratio
    is never negative and varies least; its gradient as a loss is that of another divergence (Schulman 2020;
    Tang & Munos 2025).

    Args:
        log_ratio: [T] log π - log π_ref of each sampled token.
        kind: k1, k2 or k3.

    Raises:
        ValueError: shapes or dtypes do not match, or there is no such estimate.
    """
    check_shapes(log_ratio=(log_ratio, "T"))
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"{kind}: use k1, k2 or k3")


def score_function(value: Tensor, logp: Tensor, sampled: Tensor, cap: float = 2.0) -> Tensor:
    """A loss of sampled tokens y whose gradient is that of the mean of `value` over samples of π: [T] -> [T].

    w f (1 + log π(y) - [log π(y)]), where [ ] has no gradient and neither has f: so its value is w f, and its gradient
    w f ∇ log π(y) (Williams 1992). For f = log π - log p the mean of that gradient is the gradient of KL(π || p), since
    what f itself would add, ∇ log π(y), has the mean 0. The weight w = min(π(y) / μ(y), c) corrects for tokens that
    were sampled from another distribution μ: an older policy, or an engine that rounds otherwise (Ionides 2008).

    Args:
        value: [T] f.
        logp: [T] log π(y).
        sampled: [T] log μ(y).
        cap: c.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shapes(value=(value, "T"), logp=(logp, "T"), sampled=(sampled, "T"))
    weight = (logp.detach() - sampled).exp().clamp_max(cap)
    return weight * value.detach() * (1 + logp - logp.detach())
