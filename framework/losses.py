"""Losses as functions of tensors: no model, no configuration. Each says its shapes, its units and its source."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def negative_log_likelihood(logp: Tensor, mean_logp: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each token, in nats: [T] -> [T].

    With label smoothing e (Szegedy et al. 2016, section 7) the target is 1 - e on the token and e / V on every token
    of the vocabulary, so the loss is -(1 - e) log p(y) - e mean_v log p(v).

    Args:
        logp: [T] log-prob of each token.
        mean_logp: [T] mean log-prob over the vocabulary; needed when `smoothing` is not 0.
    """
    if not smoothing:
        return -logp
    if mean_logp is None:
        raise ValueError("label smoothing needs mean_logp")
    return -(1 - smoothing) * logp - smoothing * mean_logp


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it would overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def bradley_terry(difference: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log s(r_better - r_worse - margin) of each pair: [M] -> [M] nats (Bradley & Terry 1952).

    Args:
        difference: [M] reward of the better response minus that of the worse one.
        margin: [M] by how much the difference should exceed 0 (Touvron et al. 2023, eq. 2).
    """
    return -F.logsigmoid(difference if margin is None else difference - margin)


def plackett_luce(scores: Tensor, mask: Tensor) -> Tensor:
    """-log of the probability of the whole ranking, in nats: [P, K] -> [P] (Plackett 1975; Luce 1959).

    The best is drawn with probability softmax(r), then the next among those left, and so on:
    -sum_i (r_i - logsumexp(r_i … r_K)). For two responses that is Bradley-Terry without a margin.

    Args:
        scores: [P, K] rewards, best response first.
        mask: [P, K] bool, False on padding, which stands after the responses.
    """
    low = scores.masked_fill(~mask, -1e30)  # finite, since the gradient at -inf would be nan
    after = low.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(mask, after - scores, 0.0).sum(-1)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """max(-A p, -A clip(p, 1 - e, 1 + e)) of each token: [T], [T] -> [T] (Schulman et al. 2017, eq. 7).

    Args:
        ratio: [T] p, probability of the token now over the one it was sampled with.
        advantage: [T] A.
        clip: e.
    """
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def clipped_value(value: Tensor, old: Tensor, target: Tensor, clip: float | None) -> Tensor:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 of each token: [T] -> [T].

    From the implementation of Schulman et al. 2017, not its text; the units are those of rewards.

    Args:
        value: [T] V, now.
        old: [T] V_old, when the response was sampled.
        target: [T] R.
        clip: c; None for (V - R)^2 / 2.
    """
    loss = (value - target) ** 2
    if clip is not None:
        loss = torch.maximum(loss, (old + (value - old).clamp(-clip, clip) - target) ** 2)
    return 0.5 * loss


def kl_estimate(log_ratio: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(q || p) from samples of q, with log_ratio = log q - log p: [T] nats -> [T] nats.

    k1 = log_ratio has the right mean and belongs into a reward: its gradient as a loss is 0 on average. k2 =
    log_ratio^2 / 2 is biased, but is the loss whose gradient is that of the KL. k3 = exp(-log_ratio) - 1 + log_ratio
    is never negative and varies least; its gradient as a loss is that of another divergence (Schulman 2020;
    Tang & Munos 2025).
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"{kind}: use k1, k2 or k3")
