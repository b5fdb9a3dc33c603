"""Advantages as functions of tensors: who deserves how much of a reward. Each says its shapes and its source."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor, value: Tensor, mask: Tensor, discount: float = 1.0, trace: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) and the returns that values are trained on.

        d_t = r_t + g V_(t+1) - V_t        A_t = d_t + g l A_(t+1)        R_t = A_t + V_t

    After a response's last token everything is 0: the score stands on the last token, and padding, whatever it holds,
    is never looked at. A response that was cut at the length limit ends there too.

    Args:
        reward: [N, L] reward of each token, one response a row, tokens on the left.
        value: [N, L] value of the state before each token.
        mask: [N, L] bool, False on padding.
        discount: g of the reward of the next token.
        trace: l, 1 for plain returns, 0 for one step.

    Returns:
        Advantages and returns, [N, L] each, 0 on padding. Returns belong to advantages before any whitening.
    """
    reward, value = reward.masked_fill(~mask, 0.0), value.masked_fill(~mask, 0.0)
    after = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    advantage, running = torch.zeros_like(reward), reward.new_zeros(len(reward))
    for t in reversed(range(reward.shape[1])):
        running = reward[:, t] + discount * after[:, t] - value[:, t] + discount * trace * running
        running = running.masked_fill(~mask[:, t], 0.0)
        advantage[:, t] = running
    return advantage, (advantage + value).masked_fill(~mask, 0.0)


def whiten(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean 0 and variance 1: [T], [T] -> [T], 0 where the weight is. The mean is not added back."""
    total = weight.sum().clamp_min(1e-8)
    mean = (x * weight).sum() / total
    variance = ((x - mean) ** 2 * weight).sum() / total
    return torch.where(weight > 0, (x - mean) * (variance + 1e-8).rsqrt(), 0.0)


def group_relative(score: Tensor, group: Tensor, scale: bool = False) -> Tensor:
    """Each response's score less the mean of its prompt's responses: [N], [N] -> [N].

    Args:
        score: [N] of each response.
        group: [N] int64, the prompt that each response answers.
        scale: divide by the standard deviation within the prompt (Shao et al. 2024, section 4.1.2). That is not the
            gradient of the mean reward: prompts whose responses nearly agree weigh most (Liu et al. 2025, section 3).
    """
    prompts = int(group.max()) + 1 if len(group) else 0
    count = score.new_zeros(prompts).index_add(0, group, torch.ones_like(score)).clamp_min(1)
    centred = score - (score.new_zeros(prompts).index_add(0, group, score) / count)[group]
    if not scale:
        return centred
    variance = score.new_zeros(prompts).index_add(0, group, centred**2) / count
    return centred / (variance.sqrt() + 1e-4)[group]


def leave_one_out(score: Tensor, group: Tensor) -> Tensor:
    """Each response's score less the mean of the other responses to its prompt: [N], [N] -> [N], n > 1 each
    (Kool et al. 2019, eq. 8; RLOO)."""
    prompts = int(group.max()) + 1 if len(group) else 0
    count = score.new_zeros(prompts).index_add(0, group, torch.ones_like(score))[group]
    return group_relative(score, group) * count / (count - 1)
