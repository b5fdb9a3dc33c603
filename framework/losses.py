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
