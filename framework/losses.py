"""Losses as functions of tensors: no model, no configuration. Each says its shapes, its units and its source."""

from __future__ import annotations

import math

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
