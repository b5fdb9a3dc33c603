"""Sampling of responses: one prefill per prompt for its n samples, and a batch that stays full as samples finish."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from leyden.data.tokenizer import beyond_embeddings
from leyden.errors import UserError
from leyden.models.backbone import Backbone
from leyden.models.generation.decoder import Decoder, Draft, DraftGroup, Writer, decode_by_rows
from leyden.models.generation.packed_weights import packed
from leyden.models.generation.static_decoder import StaticDecoder
from leyden.policy.policy import Policy, Response, Sampling, eval_mode


def generate(
    policy: Policy,
    backbone: Backbone,
    prompts: Sequence[list[int]],
    n: int,
    sampling: Sampling,
    keys: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_token: Callable[[int, int, int], None] | None = None,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[Response]]:
    """`n` responses to each prompt; see `Policy.generate`.

    The noise of a sample depends only on `sampling.seed`, the key of its prompt and its index among the prompt's
    samples.

    Args:
        policy: supplies tokenizer, stop tokens and positions.
        backbone: the policy's model.
        on_progress: called with the number of responses that were just completed, while others go on.
        on_token: called with every token as it is sampled: index of its prompt, index of its sample, token id. An
            exception raised in it ends the sampling and leaves the policy as it was.
        ended: whether a response ends with these tokens, which is asked after every one beside the stop tokens.
    """
    keys = range(len(prompts)) if keys is None else keys
    if len(keys) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(keys)} keys")
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    if not prompts or n < 1:
        return [[] for _ in prompts]
    longest, positions = max(map(len, prompts)), policy.positions
    if positions is not None and longest >= positions:
        raise UserError(f"a prompt has {longest} tokens but {policy.path} has positions for {positions}; shorten it")
    if policy.embeddings is not None and (last := max(map(max, prompts))) >= policy.embeddings:
        problem = beyond_embeddings(policy.tokenizer, last, policy.embeddings)
        raise UserError(f"{policy.path}: a prompt holds {problem}")
    groups = []
    for prompt, key in zip(prompts, keys, strict=True):
        drafts = [Draft(random.Random(f"{sampling.seed or 0}/{key}/{k}")) for k in range(n)]
        limit = sampling.max_new_tokens if positions is None else min(sampling.max_new_tokens, positions - len(prompt))
        groups.append(DraftGroup(prompt, drafts, limit, n))
    writer = Writer(backbone, policy.stop, sampling, on_progress or (lambda _: None))
    writer.ended = ended or writer.ended
    if on_token is not None:
        indices = {draft: (i, k) for i, group in enumerate(groups) for k, draft in enumerate(group.drafts)}
        writer.show = lambda draft, token: on_token(*indices[draft], token)
    with eval_mode(policy), torch.no_grad():  # without dropout or gradients
        _sample(backbone, writer, groups, on_token is not None)
    return [[policy.response(d.tokens, d.logp, d.finished) for d in group.drafts] for group in groups]


STATIC = {"cuda"}
"""Types of devices where decode steps have fixed shapes"""


def _sample(backbone: Backbone, writer: Writer, groups: list[DraftGroup], each: bool) -> None:
    """Sample all drafts to their end; `each` token is waited for or not."""
    # similar lengths together, and the longest first, so that memory use peaks at once
    order = sorted(groups, key=lambda group: -len(group.prompt))
    if backbone.attention == "rows":
        with backbone.native_attention():
            decode_by_rows(writer, order)
    elif backbone.device.type in STATIC:
        StaticDecoder(writer, order, each).run()
    else:
        with packed(backbone.model, max(group.limit for group in groups)):
            Decoder(writer, order).run()
