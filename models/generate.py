"""Sampling responses: each prompt is prefilled once for its n samples, and finished samples leave the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leyden.errors import UserError
from leyden.models.load import base_of, parts
from leyden.policy import Response, Sampling

if TYPE_CHECKING:
    from leyden.models.causal_lm import CausalLM

ROWS = 64
"""Samples decoded side by side."""


@dataclass
class _Draft:
    """A response being written."""

    noise: list[float]
    """One uniform number a token: the whole randomness of this sample, independent of its batch-mates."""
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finished: bool = False


def _noise(sampling: Sampling, prompt: int, sample: int) -> list[float]:
    source = random.Random(f"{sampling.seed}/{prompt}/{sample}")
    return [source.random() for _ in range(sampling.max_new_tokens)]


def truncate(logp: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the top-k tokens, then the smallest set of most probable tokens that reaches top_p; renormalise.

    `logp` [R, V] in nats, and so is what comes back, -inf where a token was dropped. The most probable token stays.
    """
    if top_k and top_k < logp.shape[-1]:
        logp = logp.masked_fill(logp < logp.topk(top_k).values[:, -1:], float("-inf")).log_softmax(-1)
    if top_p < 1:
        ordered, index = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        dropped = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logp = logp.masked_fill(dropped, float("-inf")).log_softmax(-1)
    return logp


def choose(logits: Tensor, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at `noise` [R]: token ids and their log-probs, [R]."""
    if sampling.temperature == 0:
        logp = logits.log_softmax(-1)
        token = logp.argmax(-1)
    else:
        logp = truncate((logits / sampling.temperature).log_softmax(-1), sampling.top_k, sampling.top_p)
        steps = logp.double().exp().cumsum(-1)
        token = torch.searchsorted(steps, noise[:, None].double() * steps[:, -1:], right=True)[:, 0]
        last = logp.shape[-1] - 1 - (logp > float("-inf")).flip(-1).int().argmax(-1)
        token = torch.minimum(token, last)  # rounding at the very top must not leave the kept tokens
    return token, logp.gather(-1, token[:, None])[:, 0]


def generate(policy: CausalLM, prompts: Sequence[list[int]], n: int, sampling: Sampling) -> list[list[Response]]:
    """`n` responses to each prompt; see `Policy.generate`."""
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    if not prompts:
        return []
    longest, room = max(map(len, prompts), default=0), policy.positions
    if room is not None and longest >= room:
        raise UserError(f"a prompt has {longest} tokens but {policy.path} has positions for {room}; shorten it")
    drafts = [[_Draft(_noise(sampling, p, k)) for k in range(n)] for p in range(len(prompts))]
    # similar lengths together: less padding
    order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    decode = _decode_by_rows if policy.attention == "rows" else _decode
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        with torch.no_grad(), policy.native_attention():
            step = max(1, ROWS // n)
            for at in range(0, len(order), step):
                chunk = order[at : at + step]
                space = sampling.max_new_tokens if room is None else room - len(prompts[chunk[-1]])
                limit = min(sampling.max_new_tokens, space)  # the last of a chunk is its longest
                decode(policy, [prompts[p] for p in chunk], [drafts[p] for p in chunk], sampling, limit)
    finally:
        for module, mode in modes:
            module.training = mode
    return [[_finish(policy, draft) for draft in group] for group in drafts]


def _finish(policy: CausalLM, draft: _Draft) -> Response:
    text = str(policy.tokenizer.decode(draft.tokens, skip_special_tokens=True))
    return Response(draft.tokens, draft.logp, draft.finished, text)


def _write(drafts: list[_Draft], logits: Tensor, sampling: Sampling, stop: frozenset[int]) -> Tensor:
    """Sample one token for each draft and append it; returns the tokens [R]."""
    noise = torch.tensor([d.noise[len(d.tokens)] for d in drafts], device=logits.device)
    token, logp = choose(logits, noise, sampling)
    for draft, t, lp in zip(drafts, token.tolist(), logp.tolist(), strict=True):
        draft.tokens.append(t)
        draft.logp.append(lp)
        draft.finished = t in stop
    return token


def _padded(rows: list[list[int]], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [R, L] each, padded on the left or on the right."""
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for r, row in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[r, at], mask[r, at] = torch.tensor(row), 1
    return tokens.to(device), mask.to(device)


def _decode(
    policy: CausalLM, prompts: list[list[int]], groups: list[list[_Draft]], sampling: Sampling, limit: int
) -> None:
    """Left-padded prompts, one prefill each, then one token a step against the cache."""
    from transformers import DynamicCache

    body, head, squash = parts(policy.model)
    cache: Any = DynamicCache(config=base_of(policy.model).config.get_text_config())

    def step(tokens: Tensor, mask: Tensor, position: Tensor) -> Tensor:
        """Logits after the last of these tokens: [R, V]."""
        out = body(input_ids=tokens, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        return squash(head(out.last_hidden_state[:, -1]))

    tokens, mask = _padded(prompts, left=True, device=policy.device)
    logits = step(tokens, mask, (mask.cumsum(-1) - 1).clamp_min(0))
    live, n = [draft for group in groups for draft in group], len(groups[0])
    if n > 1:
        cache.batch_repeat_interleave(n)
        logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    token = _write(live, logits, sampling, policy.stop)
    for _ in range(limit - 1):
        going = [i for i, draft in enumerate(live) if not draft.finished]
        if not going:
            return
        if len(going) < len(live):
            keep = torch.tensor(going, device=token.device)
            cache.batch_select_indices(keep)
            live, mask, token = [live[i] for i in going], mask[keep], token[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = step(token[:, None], mask, mask.sum(-1, keepdim=True) - 1)
        token = _write(live, logits, sampling, policy.stop)


def _decode_by_rows(
    policy: CausalLM, prompts: list[list[int]], groups: list[list[_Draft]], sampling: Sampling, limit: int
) -> None:
    """The same without a cache, for models whose state cannot be padded on the left: right-padded rows, run anew."""
    body, head, squash = parts(policy.model)
    live = [(prompt, draft) for prompt, group in zip(prompts, groups, strict=True) for draft in group]
    for _ in range(limit):
        live = [(prompt, draft) for prompt, draft in live if not draft.finished]
        if not live:
            return
        tokens, mask = _padded([prompt + draft.tokens for prompt, draft in live], False, policy.device)
        hidden = body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(live)), mask.sum(-1) - 1]
        _write([draft for _, draft in live], squash(head(last)), sampling, policy.stop)
