"""Two decoders: one with a KV cache, where drafts enter as others finish, and one without, for unpackable models."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leyden.batch.forest import Tree, pack
from leyden.errors import UserError
from leyden.models.attention.cached import CachedStep, DecodeStep, Prefill
from leyden.models.attention.kv_cache import Cache, close
from leyden.models.backbone import Backbone
from leyden.models.generation.sampling import choose
from leyden.policy.policy import Sampling

ROWS = {"cpu": 64, "cuda": 256}
"""Number of samples decoded side by side, where memory allows."""
MEMORY = 4 << 30
"""Bytes of the KV cache on a CPU. On a GPU it is half of the free memory."""
READ = 4096
"""Prompt tokens in one prefill."""


@dataclass(eq=False)
class Draft:
    """A response that is being sampled."""

    source: random.Random
    """Generator of one uniform number per token, this sample's only randomness; independent of the rest of the batch"""
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finished: bool = False


@dataclass(eq=False)
class DraftGroup:
    """A prompt and the drafts that answer it."""

    prompt: list[int]
    drafts: list[Draft]
    limit: int
    """Largest number of tokens of a draft"""
    unfinished: int
    state: Tensor | None = None
    """[H] hidden state of the prompt's last token, set by the prefill"""


Pair = tuple[DraftGroup, Draft]


class Writer:
    """The last part of decoding: hidden states to logits, to sampled tokens in their drafts.

    Args:
        backbone: the model.
        stop: token ids that end a response.
        sampling: temperature, top_k, top_p and length limit.
        report: called with the number of responses that were just completed.
        show: called with a draft and the token that was just appended to it.
    """

    def __init__(
        self,
        backbone: Backbone,
        stop: Collection[int],
        sampling: Sampling,
        report: Callable[[int], None],
        show: Callable[[Draft, int], None] = lambda draft, token: None,
    ) -> None:
        self.backbone, self.stop, self.sampling, self.report, self.show = backbone, stop, sampling, report, show
        self.body, self.head, self.squash = backbone.body, backbone.head, backbone.squash
        self.ended: Callable[[list[int]], bool] = lambda tokens: False
        """Whether a response ends with these tokens, beside those that end with a stop token."""

    def write(self, pairs: Sequence[Pair], hidden: Tensor) -> list[int]:
        """Append a token to each draft, sampled from hidden states [R, H]; return the indices of complete drafts."""
        noise = torch.tensor([draft.source.random() for _, draft in pairs], dtype=torch.float64, device=hidden.device)
        token, logp = self.sample(hidden, noise)
        complete = []
        for i, ((group, draft), t, lp) in enumerate(zip(pairs, token.tolist(), logp.tolist(), strict=True)):
            if self.append(group, draft, t, lp):
                complete.append(i)
        if complete:
            self.report(len(complete))
        return complete

    def sample(self, hidden: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [R] and their log-probabilities [R], from hidden states [R, H] and noise [R]."""
        return choose(self.squash(self.head(hidden)), noise, self.sampling)

    def append(self, group: DraftGroup, draft: Draft, token: int, logp: float) -> bool:
        """Append a sampled token to a draft; return whether the draft is complete."""
        if not math.isfinite(logp):
            raise UserError(
                f"{self.backbone.path}: its logits are no finite numbers, so nothing can be sampled; if this came "
                "with training, lower the learning rate"
            )
        draft.tokens.append(token)
        draft.logp.append(logp)
        self.show(draft, token)
        draft.finished = token in self.stop or self.ended(draft.tokens)
        complete = draft.finished or len(draft.tokens) == group.limit
        group.unfinished -= complete
        return complete


class Decoder:
    """Decoder with a KV cache. As soon as enough rows are free, waiting drafts enter, so that the batch stays full.

    Args:
        groups: prompts and drafts in the order of their prefill, the longest prompt first.
    """

    def __init__(self, writer: Writer, groups: Sequence[DraftGroup]) -> None:
        self.writer, self.backbone = writer, writer.backbone
        self.waiting = deque((group, draft) for group in groups for draft in group.drafts)
        self.live: list[Pair] = []
        self.open: list[DraftGroup] = []
        self.samples = len(groups[0].drafts)
        self.longest, self.limit = len(groups[0].prompt), max(group.limit for group in groups)
        self.rows, self.prompts = places(self.backbone, len(groups), self.samples, self.longest, self.limit)
        self.cache = self.make_cache()

    def make_cache(self) -> Any:
        return Cache(self.rows, self.prompts, self.longest, self.backbone.device)

    def run(self) -> None:
        while self.waiting or self.live:
            coming = self.next()
            if coming:
                self.admit(coming)
            else:
                self.step()

    def next(self) -> list[Pair]:
        """Drafts to admit now: none before enough rows are free, and at most as many prompts as have places."""
        free, coming = self.rows - len(self.live), list[Pair]()
        if free < min(max(1, self.rows // 8), len(self.waiting)):
            return coming
        room, new = self.cache.prompts - len(self.open), set[int]()
        while self.waiting and len(coming) < free:
            group = self.waiting[0][0]
            if group.state is None and id(group) not in new:
                if len(new) == room:
                    break
                new.add(id(group))
            coming.append(self.waiting.popleft())
        return coming

    def admit(self, coming: list[Pair]) -> None:
        """Prefill new prompts, sample every draft's first token, and give rows to the drafts that are not complete."""
        new: list[DraftGroup] = []
        for group in dict.fromkeys(group for group, _ in coming if group.state is None):
            if new and sum(len(g.prompt) for g in [*new, group]) > READ:
                self.read(new)
                new = []
            new.append(group)
        if new:
            self.read(new)
        states = torch.stack([group.state for group, _ in coming if group.state is not None])
        complete = set(self.writer.write(coming, states))
        entering = [pair for i, pair in enumerate(coming) if i not in complete]
        place_of = {id(group): i for i, group in enumerate(self.open)}
        self.cache.enter([place_of[id(group)] for group, _ in entering])
        self.live += entering
        self.forget()

    def read(self, groups: list[DraftGroup]) -> None:
        """Prefill: run the model over prompts, whose keys and values stay in the KV cache."""
        batch = pack([Tree(group.prompt, []) for group in groups]).to(self.backbone.device)
        forest = Prefill(batch, self.backbone.backend(self.backbone.device), self.cache)
        hidden = self.run_body(batch.tokens, batch.position, forest)
        for group, span in zip(groups, batch.structure(), strict=True):
            group.state = hidden[span.cut - 1].clone()
        self.open += groups

    def step(self) -> None:
        """Decode step: one more token for every row."""
        newest = [(draft.tokens[-1], len(group.prompt) + len(draft.tokens) - 1) for group, draft in self.live]
        tokens, position = torch.tensor(newest, device=self.backbone.device).T
        self.leave(self.writer.write(self.live, self.run_body(tokens, position, DecodeStep(self.cache))))

    def leave(self, complete: Sequence[int]) -> None:
        """Take out complete drafts, and prompts that have no others."""
        if complete:
            self.cache.leave(complete)
            close(self.live, complete)
            self.forget()

    def run_body(self, tokens: Tensor, position: Tensor, forest: Prefill | CachedStep) -> Tensor:
        """The body's hidden states [T, H] of tokens [T]."""
        out = self.writer.body(input_ids=tokens[None], position_ids=position[None], use_cache=False, forest=forest)
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Drop prompts whose drafts are all complete."""
        gone = [i for i, group in enumerate(self.open) if not group.unfinished]
        if gone:
            self.cache.forget(gone)
            close(self.open, gone)


def places(backbone: Backbone, groups: int, samples: int, longest: int, limit: int) -> tuple[int, int]:
    """Number of samples decoded side by side, and largest number of prompts that they belong to.

    The prompts are twice as many as full groups would need, since groups are seldom complete at the same time.
    """
    tokens = limit + longest * min(2, samples) // samples
    rows = min(most_rows(backbone, tokens), groups * samples)
    return rows, min(rows, groups, 2 * -(-rows // samples))


def most_rows(backbone: Backbone, tokens: int) -> int:
    """Number of rows of `tokens` tokens each that are decoded side by side."""
    device, memory = backbone.device, MEMORY
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        memory = (torch.cuda.mem_get_info(device)[0] + unused) // 2
    return max(1, min(ROWS.get(device.type, ROWS["cuda"]), memory // (tokens * token_bytes(backbone))))


def token_bytes(backbone: Backbone) -> int:
    """Bytes of one token in the KV cache, found by reading one: layers may differ in heads and widths."""
    cache, batch = Cache(1, 1, 1, backbone.device), pack([Tree([0], [])]).to(backbone.device)
    forest = Prefill(batch, backbone.backend(backbone.device), cache)
    backbone.body(input_ids=batch.tokens[None], position_ids=batch.position[None], use_cache=False, forest=forest)
    return cache.token_bytes


def decode_by_rows(writer: Writer, groups: Sequence[DraftGroup]) -> None:
    """Decoder without a cache, for models whose state cannot be packed or padded on the left.

    At each step it runs all right-padded rows anew.
    """
    waiting, device = [(group, draft) for group in groups for draft in group.drafts], writer.backbone.device
    for start in range(0, len(waiting), ROWS["cpu"]):
        live = waiting[start : start + ROWS["cpu"]]
        while live:
            rows = [torch.tensor(group.prompt + draft.tokens) for group, draft in live]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            mask = (torch.arange(tokens.shape[1], device=device) <= last[:, None]).long()
            hidden = writer.body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            close(live, writer.write(live, hidden[torch.arange(len(live)), last]))
