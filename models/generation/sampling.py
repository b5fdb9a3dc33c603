"""The choice of tokens: logits and uniform noise to token ids and their log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from leyden.policy.policy import Sampling

BLOCK = 256
"""Tokens per block. Cumulative sums run over the blocks' probabilities, and inside only one block of each row."""


def truncate(logp: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the top-k tokens, then the smallest set of most probable tokens that reaches top_p; renormalise.

    Takes and returns log-probabilities [R, V] in nats, -inf for dropped tokens. The most probable token stays.
    """
    if top_k and top_k < logp.shape[-1]:
        logp = logp.masked_fill(logp < logp.topk(top_k).values[:, -1:], float("-inf")).log_softmax(-1)
    if top_p < 1:
        ordered, index = logp.sort(-1, descending=True)
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        dropped = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, index, mass_before >= top_p)
        logp = logp.masked_fill(dropped, float("-inf")).log_softmax(-1)
    return logp


def choose(logits: Tensor, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverting the cumulative distribution at `noise`.

    Args:
        logits: [R, V] fp32
        noise: [R] fp64, uniform in [0, 1)
        sampling: temperature (0 takes the most probable token), top_k and top_p.

    Returns:
        Token ids [R], and the log-probability of each under the distribution that it was sampled from, [R] nats.
    """
    if sampling.temperature == 0:
        top = logits.max(-1)
        return top.indices, top.values - logits.logsumexp(-1)
    z = logits if sampling.temperature == 1 else logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        z = truncate(z.log_softmax(-1), sampling.top_k, sampling.top_p)
    return _invert(z, noise.double())


def _invert(z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """`choose` for softmax(z). Probabilities are fp32; only their sums over blocks are accumulated, in fp64."""
    rows, size = z.shape
    top = z.amax(-1, keepdim=True)
    mass = z.new_zeros(rows, -(-size // BLOCK), BLOCK)
    torch.sub(z, top, out=mass.view(rows, -1)[:, :size])
    mass.view(rows, -1)[:, :size].exp_()
    below = mass.sum(-1).double().cumsum(-1)  # [R, blocks]
    target = _clamp_below(noise[:, None] * below[:, -1:], below[:, -1:])
    block = torch.searchsorted(below, target, right=True).clamp_max(below.shape[1] - 1)
    start = torch.where(block > 0, below.gather(-1, (block - 1).clamp_min(0)), 0.0)
    cumulative = mass[torch.arange(rows, device=z.device), block[:, 0]].double().cumsum(-1)  # [R, BLOCK]
    token = block * BLOCK + torch.searchsorted(cumulative, _clamp_below(target - start, cumulative[:, -1:]), right=True)
    token = token.clamp_max(size - 1)  # only where the logits are not numbers
    logp = z.gather(-1, token) - top - below[:, -1:].log().float()
    return token[:, 0], logp[:, 0]


def _clamp_below(x: Tensor, end: Tensor) -> Tensor:
    """`x` clamped below `end`, so that rounding cannot step past the last token with nonzero probability."""
    return torch.minimum(x, torch.nextafter(end, torch.zeros_like(end)))
